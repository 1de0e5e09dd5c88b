"""The server's configuration, typed; the defaults are the command line's."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.checkpoint_options import CheckpointOptions

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
    """

    model_name_or_path: str = DEFAULT_CHECKPOINT
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    transport: str = "auto"
    max_sessions: int = 64

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport: got {self.transport!r}, expected one of {TRANSPORTS}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: got {self.port}, expected 0 to 65535")
        if self.max_sessions < 1:
            raise ValueError(f"max_sessions: got {self.max_sessions}, expected 1 or more")
