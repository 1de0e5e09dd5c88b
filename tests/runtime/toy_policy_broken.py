"""A module of somebody's that does not even import."""

raise RuntimeError("no such luck")
