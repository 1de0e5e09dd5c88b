"""Shared memory: segments, rings, latest values and the channel over them."""
