"""Exceptions of ``envs``; all derive from ``EnvError``."""

from __future__ import annotations


class EnvError(Exception):
    """Base of every error that this package raises on purpose."""


class RenderingUnavailable(EnvError):
    """No rendering backend works here; the message says what was tried and what to install."""


class UnknownCamera(EnvError):
    """The world has no such camera; the message lists those it has."""


class PhysicsDiverged(EnvError):
    """The simulation's state is no longer valid, e.g. an acceleration became infinite."""
