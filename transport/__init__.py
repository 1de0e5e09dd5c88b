"""Arrays between processes, by shared memory or TCP, and child processes. Knows no policies."""
