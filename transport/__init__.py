"""Arrays between processes, over shared memory or TCP; child processes. Imports no policy code."""
