"""Evaluation on a robot: the command and its control, sensing and watchdog processes."""
