"""How a client connects to a server: transport, image encoding and keys.

The process that commands a robot imports this module too; it must not import zmq.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from policies import jpeg
from policies.flag_builder import Flag
from policies.jpeg import DEFAULT_QUALITY, JpegMissing
from policies.number_ranges import Choice, Range, check_ranges
from runtime.options.defaults import TRANSPORTS

if TYPE_CHECKING:
    from transport.zeromq.curve import ClientKeys

QUALITY = Range(jpeg.QUALITIES.start, jpeg.QUALITIES.stop - 1)


def absolute_path(name: str) -> str:
    """Return ``name`` as an absolute path; an empty name stays empty."""
    return str(Path(name).resolve()) if name else ""


ServerKey = Annotated[
    str, Flag("the server's public key file (metronome keys)", metavar="FILE", read=absolute_path)
]
ClientKey = Annotated[
    str, Flag("the client's secret key file (metronome keys)", metavar="FILE", read=absolute_path)
]


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How a client connects to a server and sends its images.

    Images are sent as JPEG only over a network. The key files are for a server that requires keys.

    Raises:
        ValueError: The JPEG quality is out of range, or one key is given without the other.
    """

    transport: Annotated[str, Choice(TRANSPORTS), Flag("transport to the server")] = "auto"
    resize: Annotated[bool, Flag("resize images to the model's size before they are sent")] = False
    jpeg_quality: Annotated[
        int | None,
        QUALITY,
        Flag(
            "JPEG quality of images sent over a network",
            name="jpeg",
            const=DEFAULT_QUALITY,
            default=f"no JPEG; {DEFAULT_QUALITY} without a value",
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
        """Check that the key files can be read and that the JPEG codec is installed.

        Raises:
            JpegMissing: JPEG is wanted and its codec is not installed.
            KeyFileError: A key file cannot be used.
        """
        self.keys()
        if self.jpeg_quality is not None:
            jpeg.codec()

    def keywords(self) -> dict[str, Any]:
        """Return the options as keyword arguments of ``PolicyClient``; the values fit into JSON."""
        return dataclasses.asdict(self)

    def keys(self) -> ClientKeys | None:
        """Read the key files; None without them. Raises ``KeyFileError``."""
        if not self.server_key:
            return None
        from transport.zeromq.curve import ClientKeys

        return ClientKeys.load(self.server_key, self.client_key)

    def candidates(self) -> tuple[tuple[str, int | None], ...]:
        """Return the pairs (transport, JPEG quality) in the order to try.

        Shared memory gets no JPEG: it would cost time and quality and save nothing.
        """
        if self.jpeg_quality is None:
            return ((self.transport, None),)
        candidates = {"shm": None, "zmq": self.jpeg_quality}
        return tuple(
            (name, quality)
            for name, quality in candidates.items()
            if self.transport in ("auto", name)
        ) or ((self.transport, None),)


def check_flags(options: ConnectionOptions) -> None:
    """Call ``options.check``; raise ``ValueError`` that names the flag if it fails."""
    from transport.zeromq.curve import KeyFileError

    try:
        options.check()
    except KeyFileError as error:
        raise ValueError(f"--server_key, --client_key: {error}") from error
    except JpegMissing as error:
        raise ValueError(f"--jpeg: {error}") from error
