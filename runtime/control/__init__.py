"""Control at a fixed rate: the loop, the chunk executor, and commands within the robot's limits."""
