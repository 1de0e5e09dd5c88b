"""Control at a fixed rate: the loop, the chunk executor and what turns a plan into commands."""
