"""The exceptions of ``runtime``, one tree."""

from __future__ import annotations


class RuntimeFault(Exception):
    """The base of every exception that ``runtime`` raises itself."""


class ModelNameError(RuntimeFault):
    """The value of ``-m`` is no path, address or factory; the message says how it was read."""


class ComparisonError(RuntimeFault):
    """Result files that cannot be read or compared; the message has field, got and expected."""


class JournalError(RuntimeFault):
    """An evaluation's journal that cannot be read, or that another evaluation writes."""


class ServerLost(RuntimeFault):
    """The server ended the session or died; ``PolicyClient.reconnect`` opens a new session."""


class ServerBusy(RuntimeFault):
    """The send buffer is full: the server has read none of the last requests; nothing was sent."""


class RequestTimeout(RuntimeFault):
    """No reply arrived in time. A reply that arrives later is dropped."""
