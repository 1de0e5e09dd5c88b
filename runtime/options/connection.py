"""How a client wants to be connected: as flags, as a value, and across a process boundary."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from policies import jpeg
from policies.command_line import Number
from policies.jpeg import JpegMissing, QualityError
from policies.number_ranges import Range
from runtime.options.defaults import TRANSPORTS
from runtime.protocol.image_codec import DEFAULT_QUALITY
from transport.zeromq.curve import ClientKeys, KeyFileError

QUALITY = Range(jpeg.QUALITIES.start, jpeg.QUALITIES.stop - 1)


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How a client wants to be connected, and its pictures to cross.

    Attributes:
        transport: ``"auto"``, ``"shm"`` or ``"zmq"``.
        resize: Bring pictures to the model's size before they are sent.
        jpeg_quality: Send them as JPEG where the session goes over a network, 1 to 100.
        server_key, client_key: Files of ``runtime.tools.keys``, for a server that wants keys: its
            public key, and one's own secret one.

    Raises:
        ValueError: A quality that is none, or one key without the other.
        JpegMissing: JPEG without its codec.
        KeyFileError: A key file that cannot be used.
    """

    transport: str = "auto"
    resize: bool = False
    jpeg_quality: Annotated[int, QUALITY] | None = None
    server_key: str = ""
    client_key: str = ""

    def __post_init__(self) -> None:
        if bool(self.server_key) != bool(self.client_key):
            raise ValueError("server_key, client_key: got one, expected both or neither")
        self.keys()
        if self.jpeg_quality is not None:
            if self.jpeg_quality not in jpeg.QUALITIES:
                raise QualityError(f"jpeg_quality: got {self.jpeg_quality}, expected 1 to 100")
            jpeg.codec()

    def keywords(self) -> dict[str, Any]:
        """What ``PolicyClient`` and ``ConnectionOptions`` take to wish the same; JSON values."""
        return dataclasses.asdict(self)

    def keys(self) -> ClientKeys | None:
        """As the files say now; None without."""
        if not self.server_key:
            return None
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


def add_flags(cli: argparse.ArgumentParser) -> None:
    """The flags of every command that talks to a server."""
    add = cli.add_argument
    add("--transport", choices=TRANSPORTS, default="auto", help="to a server (auto)")
    add("--resize", action="store_true", help="send a server pictures of the model's size")
    add(
        "--jpeg",
        type=Number(int, QUALITY),
        nargs="?",
        const=DEFAULT_QUALITY,
        metavar="QUALITY",
        help=f"send a server pictures as JPEG, 1 to 100, over a network ({DEFAULT_QUALITY})",
    )
    add_key_flags(cli)


def add_key_flags(cli: argparse.ArgumentParser) -> None:
    """For a server that wants keys."""
    add = cli.add_argument
    add(
        "--server_key",
        default="",
        metavar="FILE",
        help="the server's public key (runtime.tools.keys)",
    )
    add("--client_key", default="", metavar="FILE", help="one's own secret key")


def from_flags(args: argparse.Namespace) -> ConnectionOptions:
    """What the flags ask for.

    Raises:
        ValueError: What cannot be had; names the flag.
    """
    keys = tuple(str(Path(name).resolve()) if name else "" for name in key_files(args))
    try:
        return ConnectionOptions(args.transport, args.resize, args.jpeg, *keys)
    except KeyFileError as error:
        raise ValueError(f"--server_key, --client_key: {error}") from error
    except (JpegMissing, QualityError) as error:
        raise ValueError(f"--jpeg: {error}") from error


def key_files(args: argparse.Namespace) -> tuple[str, str]:
    """As the flags name them."""
    return args.server_key, args.client_key
