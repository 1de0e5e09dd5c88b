"""What can go wrong in a simulated world, one tree."""

from __future__ import annotations


class EnvError(Exception):
    """Anything this package raises on purpose."""


class RenderingUnavailable(EnvError):
    """No way to render here; the message says what was tried and which package to install."""


class UnknownCamera(EnvError):
    """A camera that the world does not have; the message lists those it has."""


class PhysicsDiverged(EnvError):
    """The simulation is no longer valid, e.g. an acceleration became infinite."""
