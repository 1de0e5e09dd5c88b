"""The only place where transports, policies, environments and robots meet."""
