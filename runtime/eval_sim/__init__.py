"""Evaluation in simulation: the command, its workers and their episodes."""
