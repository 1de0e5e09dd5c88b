"""Policy classes of the installed ``lerobot`` package as a ``Policy``."""
