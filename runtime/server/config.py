"""The server's configuration, typed; the defaults are the command line's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from policies.number_ranges import COUNT, DURATION_S_OR_NONE, PORT_OR_ANY, Range, check_ranges
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.defaults import DEFAULT_CHECKPOINT, DEFAULT_PORT, TRANSPORTS
from runtime.server.admission import SessionLimits
from transport.zeromq.curve import ServerKeys

BATCH_WAIT_MS = Range(0, 60_000)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What ``configs/server/*.yaml`` may say. Flags on the command line win.

    Attributes:
        model_name_or_path: Checkpoint, or ``python:package.module:factory``.
        host, port: Where to listen. Beyond loopback anybody who reaches the port can connect.
        checkpoint: How to load it.
        transport: ``auto``, ``shm`` or ``zmq``.
        max_sessions: Sessions open at a time.
        max_batch: Observations computed together at most; None for all the model can.
        batch_wait_ms: How long a simulation's request may wait for partners.
        session_timeout_s: End a session that has said nothing for so long; 0 for never.
        limits: On what a session may ask for.
        curve_key: The server's secret key file (``runtime.tools.keys``); empty for no encryption.
        curve_allow: The folder with the public keys that are let in.
        metrics_host, metrics_port: Where Prometheus may ask; port 0 for nowhere.
    """

    model_name_or_path: str = DEFAULT_CHECKPOINT
    host: str = "127.0.0.1"
    port: Annotated[int, PORT_OR_ANY] = DEFAULT_PORT
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    transport: str = "auto"
    max_sessions: Annotated[int, COUNT] = 64
    max_batch: Annotated[int, COUNT] | None = None
    batch_wait_ms: Annotated[float, BATCH_WAIT_MS] = 0.0
    session_timeout_s: Annotated[float, DURATION_S_OR_NONE] = 0.0
    limits: SessionLimits = field(default_factory=SessionLimits)
    curve_key: str = ""
    curve_allow: str = ""
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, PORT_OR_ANY] = 0

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport: got {self.transport!r}, expected one of {TRANSPORTS}")
        check_ranges(self)
        if bool(self.curve_key) != bool(self.curve_allow):
            raise ValueError("curve_key, curve_allow: got one, expected both or neither")

    def keys(self) -> ServerKeys | None:
        """As the files say; None without.

        Raises:
            KeyFileError: They cannot be used.
        """
        return ServerKeys.load(self.curve_key, self.curve_allow) if self.curve_key else None
