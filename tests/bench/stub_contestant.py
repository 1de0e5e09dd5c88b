"""A contestant that cannot be built."""

from __future__ import annotations


def broken(setting):
    raise RuntimeError("no kernel image\nis available for this device")
