"""Datasets of episodes in LeRobot's format v3.0, written and read without LeRobot."""
