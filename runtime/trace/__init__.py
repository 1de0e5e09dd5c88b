"""Tracing: records the timing of a process for a trace viewer."""
