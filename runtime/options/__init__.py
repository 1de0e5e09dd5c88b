"""Flags and configurations that several commands share."""
