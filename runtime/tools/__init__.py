"""Commands beside the server and the evaluations."""
