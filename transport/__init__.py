"""Arrays from one process to another, by shared memory or TCP. Knows nothing of policies."""
