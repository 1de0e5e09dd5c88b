"""All exceptions of this package. Foreign errors are raised as one of these, with their cause."""

from __future__ import annotations


class TransportError(Exception):
    """Base class of every error that this package raises on purpose."""


class SchemaMismatch(TransportError):
    """An array does not match the declared schema.

    Attributes:
        field, got, expected: The array's name, what arrived, and what the schema declares.
    """

    def __init__(self, field: str, got: str, expected: str) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}")
        self.field, self.got, self.expected = field, got, expected


class Refused(TransportError):
    """The server declined the session.

    Attributes:
        field, got, expected: What did not match, as the server reported it.
    """

    def __init__(self, field: str, got: str, expected: str) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}")
        self.field, self.got, self.expected = field, got, expected


class ProtocolError(TransportError):
    """The bytes do not follow this protocol, or follow another version of it."""


class TransportUnavailable(TransportError):
    """The requested transport is not available; the message says why."""


class AddressInUse(TransportError):
    """Another program listens on the port; the message names the port."""


class TransportTimeout(TransportError):
    """Nothing arrived within the given time."""


class WouldBlock(TransportError):
    """The ring or the send queue is full. The channel's statistics count it."""


class PeerGone(TransportError):
    """The other side ended the session or died; the message says which, with its reason."""


class ChannelClosed(TransportError):
    """A channel was used after ``close``, or a message's arrays after ``release``."""


class ViewsHeld(TransportError):
    """Arrays are still referenced too many messages after their release."""


class ChildFailed(TransportError):
    """A child process did not become ready; the message says which and why.

    Attributes:
        error: The reason the child sent; empty if it ended or took too long instead.
        kind: Name of the exception in the child, if the child sent one.
    """

    def __init__(self, message: str, *, error: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.error, self.kind = error, kind
