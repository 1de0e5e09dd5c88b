"""Loaders that turn a checkpoint directory of any supported layout into a policy."""
