"""Shaped like LeRobot, for tests of the adapter; nothing of it is LeRobot's."""
