"""The server's configuration, typed; the defaults are the command line's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from policies.flags import Flag, Group
from policies.number_ranges import (
    COUNT,
    DURATION_S_OR_NONE,
    PORT_OR_ANY,
    Choice,
    Range,
    check_ranges,
)
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.common import LogLevel, TraceFile
from runtime.options.defaults import DEFAULT_CHECKPOINT, DEFAULT_PORT, TRANSPORTS
from runtime.server.admission import SessionLimits

if TYPE_CHECKING:
    from transport.zeromq.curve import ServerKeys

BATCH_WAIT_MS = Range(0, 60_000)
DESCRIPTOR = Range(3, 1_048_576)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What ``configs/server/*.yaml`` may say; flags win.

    Beyond loopback anybody who reaches the port can connect, unless there are keys.
    """

    model_name_or_path: Annotated[str, Flag("checkpoint, or python:MODULE:FACTORY", "-m")] = (
        DEFAULT_CHECKPOINT
    )
    host: Annotated[str, Flag("where to listen")] = "127.0.0.1"
    port: Annotated[int, PORT_OR_ANY, Flag("0 takes a free one", "-p")] = DEFAULT_PORT
    transport: Annotated[
        str, Choice(TRANSPORTS), Flag("what clients are offered", default="both")
    ] = "auto"
    max_sessions: Annotated[int, COUNT, Flag("clients at a time")] = 64
    max_batch: Annotated[
        int | None, COUNT, Flag("observations computed together", default="all the model can")
    ] = None
    batch_wait_ms: Annotated[
        float, BATCH_WAIT_MS, Flag("how long a simulation waits for partners")
    ] = 0.0
    session_timeout_s: Annotated[
        float, DURATION_S_OR_NONE, Flag("end who has said nothing for so long", default="never")
    ] = 0.0
    limits: SessionLimits = field(default_factory=SessionLimits)
    curve_key: Annotated[
        str, Flag("encrypt: the server's secret key (runtime.tools.keys)", metavar="FILE")
    ] = ""
    curve_allow: Annotated[str, Flag("public keys of those who are let in", metavar="DIR")] = ""
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[
        int, PORT_OR_ANY, Flag("for Prometheus", "--metrics-port", default="none")
    ] = 0
    checkpoint: Annotated[CheckpointOptions, Group("a checkpoint's options")] = field(
        default_factory=CheckpointOptions
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if bool(self.curve_key) != bool(self.curve_allow):
            raise ValueError("curve_key, curve_allow: got one, expected both or neither")

    @property
    def transports(self) -> tuple[str, ...]:
        """What clients are offered."""
        return ("shm", "zmq") if self.transport == "auto" else (self.transport,)

    def keys(self) -> ServerKeys | None:
        """As the files say; None without.

        Raises:
            KeyFileError: They cannot be used.
        """
        if not self.curve_key:
            return None
        from transport.zeromq.curve import ServerKeys

        return ServerKeys.load(self.curve_key, self.curve_allow)


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """The server's command line: its configuration, and what no configuration file says.

    Attributes:
        server: What the file and the flags make together.
        ready_fd: An inherited pipe of the program that starts the server.
    """

    server: ServerConfig
    insecure: Annotated[bool, Flag("no warning for lack of encryption")] = False
    config: Annotated[str, Flag("name under configs/server, or a YAML's path")] = "default"
    stop_with_stdin: Annotated[bool, Flag("stop when standard input closes")] = False
    ready_fd: Annotated[
        int | None, DESCRIPTOR, Flag("a descriptor that gets the address as JSON", hidden=True)
    ] = None
    trace: TraceFile = None
    log_level: LogLevel = "INFO"
