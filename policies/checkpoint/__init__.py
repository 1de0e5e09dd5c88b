"""Loads a checkpoint folder of any supported layout as a policy."""
