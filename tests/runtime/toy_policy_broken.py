"""A policy module that fails to import."""

raise RuntimeError("no such luck")
