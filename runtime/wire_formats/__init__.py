"""Serialization formats of other systems, read within bounds, for gateways and upstreams."""
