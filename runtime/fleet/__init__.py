"""Evaluations on a Ray cluster: its nodes, their worlds' processes and their policy servers."""
