"""A live view of an evaluation in Rerun's viewer, logged by a process of its own."""
