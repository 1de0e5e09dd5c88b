"""The client: a served policy that is used like a local one."""

from runtime.client.policy_client import PolicyClient

__all__ = ["PolicyClient"]
