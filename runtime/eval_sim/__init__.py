"""Evaluation in simulation: the command, its worker processes and the episode loop."""
