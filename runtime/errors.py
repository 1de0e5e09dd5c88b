"""What can go wrong at run time, one tree."""

from __future__ import annotations


class RuntimeFault(Exception):
    """Anything this package raises on purpose."""


class ModelNameError(RuntimeFault):
    """``-m`` that is neither a path, nor an address, nor a factory; says how it was read."""


class ServerLost(RuntimeFault):
    """The server ended the session or died. ``PolicyClient.reconnect`` starts a new one."""


class ServerBusy(RuntimeFault):
    """The server has not looked at any of the last requests yet; nothing more can be sent."""


class RequestTimeout(RuntimeFault):
    """The answer did not come in time. It will be dropped if it still comes."""
