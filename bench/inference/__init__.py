"""How fast the network runs: contestants in processes of their own, in turns, and their limits."""
