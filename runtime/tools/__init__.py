"""Command-line tools: server status and administration, keys, training, a demo."""
