"""Training ACT on demonstrations."""
