"""Simulated worlds as gymnasium environments, and their mapping to MetaObs."""
