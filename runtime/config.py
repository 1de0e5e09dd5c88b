"""The server's configuration, typed; the defaults are the command line's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from runtime.admission import Limits
from runtime.checkpoint_options import CheckpointOptions
from transport.curve import ServerKeys

DEFAULT_CHECKPOINT = "ckpt/act_sim_transfer_cube_scripted_zscore_example"
DEFAULT_PORT = 5000
TRANSPORTS = ("auto", "shm", "zmq")


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
        curve_key: The server's secret key file (``runtime.keys``); empty for no encryption.
        curve_allow: The folder with the public keys that are let in.
        metrics_host, metrics_port: Where Prometheus may ask; port 0 for nowhere.
    """

    model_name_or_path: str = DEFAULT_CHECKPOINT
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    transport: str = "auto"
    max_sessions: int = 64
    max_batch: int | None = None
    batch_wait_ms: float = 0.0
    session_timeout_s: float = 0.0
    limits: Limits = field(default_factory=Limits)
    curve_key: str = ""
    curve_allow: str = ""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport: got {self.transport!r}, expected one of {TRANSPORTS}")
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 to 65535")
        if self.max_sessions < 1:
            raise ValueError(f"max_sessions: got {self.max_sessions}, expected 1 or more")
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"max_batch: got {self.max_batch}, expected 1 or more")
        for name in ("batch_wait_ms", "session_timeout_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if bool(self.curve_key) != bool(self.curve_allow):
            raise ValueError("curve_key, curve_allow: got one, expected both or neither")

    def keys(self) -> ServerKeys | None:
        """As the files say; None without.

        Raises:
            KeyFileError: They cannot be used.
        """
        return ServerKeys.load(self.curve_key, self.curve_allow) if self.curve_key else None
