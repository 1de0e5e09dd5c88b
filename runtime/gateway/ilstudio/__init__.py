"""The gateway for ILStudio's clients: pickles over TCP."""
