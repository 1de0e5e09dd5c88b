"""What can go wrong between two processes, one tree. Foreign errors are mapped here, with cause."""

from __future__ import annotations


class TransportError(Exception):
    """Anything this package raises on purpose."""


class SchemaMismatch(TransportError):
    """Arrays that are not what was declared.

    Attributes:
        field, got, expected: The array's name, what came, and what the schema says.
    """

    def __init__(self, field: str, got: str, expected: str) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}")
        self.field, self.got, self.expected = field, got, expected


class Refused(TransportError):
    """The server declined the session.

    Attributes:
        field, got, expected: What did not match, as the server said it.
    """

    def __init__(self, field: str, got: str, expected: str) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}")
        self.field, self.got, self.expected = field, got, expected


class ProtocolError(TransportError):
    """Bytes that are not of this protocol, or of another version of it."""


class TransportUnavailable(TransportError):
    """The transport that was forced cannot be had; the message says why."""


class AddressInUse(TransportError):
    """The port is taken; the message says which."""


class TransportTimeout(TransportError):
    """Nothing came within the time given."""


class WouldBlock(TransportError):
    """The ring, or the send queue, is full. Counted in the channel's statistics."""


class PeerGone(TransportError):
    """The other side ended the session or died; the message says which, with its reason."""


class ChannelClosed(TransportError):
    """Used after ``close``, or a message's arrays after ``release``."""


class ViewsHeld(TransportError):
    """Arrays of too many released messages are still held; the message says how many."""


class ChildFailed(TransportError):
    """A child process did not become ready; the message says which and why.

    Attributes:
        error: What the child itself said; empty if it ended or took too long instead.
        kind: The name of the exception that it was there, if the child said that.
    """

    def __init__(self, message: str, *, error: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.error, self.kind = error, kind
