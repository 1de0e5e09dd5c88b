"""The client: ``PolicyClient`` uses a policy on a server like a local one."""

from runtime.client.policy_client import PolicyClient

__all__ = ["PolicyClient"]
