"""How a client wants to be connected: as flags, as a value, and across a process boundary.

The process that commands a robot reads this, too, and must not import zmq.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from policies import jpeg
from policies.flags import Flag
from policies.jpeg import DEFAULT_QUALITY, JpegMissing
from policies.number_ranges import Choice, Range, check_ranges
from runtime.options.defaults import TRANSPORTS

if TYPE_CHECKING:
    from transport.zeromq.curve import ClientKeys

QUALITY = Range(jpeg.QUALITIES.start, jpeg.QUALITIES.stop - 1)


def whole_path(name: str) -> str:
    """The same file from every folder."""
    return str(Path(name).resolve()) if name else ""


ServerKey = Annotated[
    str, Flag("the server's public key (runtime.tools.keys)", metavar="FILE", read=whole_path)
]
ClientKey = Annotated[str, Flag("one's own secret key", metavar="FILE", read=whole_path)]


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How a client wants to be connected, and its pictures to cross.

    Pictures go as JPEG only where the session goes over a network. The key files are for a server
    that wants keys.

    Raises:
        ValueError: A quality that is none, or one key without the other.
    """

    transport: Annotated[str, Choice(TRANSPORTS), Flag("to a server")] = "auto"
    resize: Annotated[bool, Flag("send a server pictures of the model's size")] = False
    jpeg_quality: Annotated[
        int | None,
        QUALITY,
        Flag(
            "send a server pictures as JPEG, 1 to 100, over a network",
            name="jpeg",
            const=DEFAULT_QUALITY,
            default=str(DEFAULT_QUALITY),
            metavar="QUALITY",
        ),
    ] = None
    server_key: ServerKey = ""
    client_key: ClientKey = ""

    def __post_init__(self) -> None:
        check_ranges(self)
        if bool(self.server_key) != bool(self.client_key):
            raise ValueError("server_key, client_key: got one, expected both or neither")

    def check(self) -> None:
        """Find out now whether what they need is here.

        Raises:
            JpegMissing: JPEG without its codec.
            KeyFileError: A key file that cannot be used.
        """
        self.keys()
        if self.jpeg_quality is not None:
            jpeg.codec()

    def keywords(self) -> dict[str, Any]:
        """What ``PolicyClient`` and ``ConnectionOptions`` take to wish the same; JSON values."""
        return dataclasses.asdict(self)

    def keys(self) -> ClientKeys | None:
        """As the files say now; None without."""
        if not self.server_key:
            return None
        from transport.zeromq.curve import ClientKeys

        return ClientKeys.load(self.server_key, self.client_key)

    def candidates(self) -> tuple[tuple[str, int | None], ...]:
        """(transport, JPEG quality), in the order to try. Shared memory carries pixels for
        nothing: JPEG would only cost time and bits there."""
        if self.jpeg_quality is None:
            return ((self.transport, None),)
        candidates = {"shm": None, "zmq": self.jpeg_quality}
        return tuple(
            (name, quality)
            for name, quality in candidates.items()
            if self.transport in ("auto", name)
        ) or ((self.transport, None),)


def check_flags(options: ConnectionOptions) -> None:
    """``ConnectionOptions.check``, whose errors name the flag. Raises ``ValueError``."""
    from transport.zeromq.curve import KeyFileError

    try:
        options.check()
    except KeyFileError as error:
        raise ValueError(f"--server_key, --client_key: {error}") from error
    except JpegMissing as error:
        raise ValueError(f"--jpeg: {error}") from error
