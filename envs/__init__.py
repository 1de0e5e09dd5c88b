"""Simulated environments: the ALOHA tasks, gymnasium environments and a fake one for tests."""
