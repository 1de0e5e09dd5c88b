"""Tracing: what happened when, for a trace viewer."""
