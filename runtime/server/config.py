"""The server's configuration and its command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from policies.flag_builder import Flag, Group
from policies.number_ranges import (
    COUNT,
    DURATION_S_OR_NONE,
    PORT_OR_ANY,
    Choice,
    Range,
    check_ranges,
)
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.defaults import DEFAULT_CHECKPOINT, DEFAULT_PORT, TRANSPORTS
from runtime.options.shared_flags import LogLevel, TraceFile
from runtime.options.upstream import UpstreamOptions
from runtime.server.admission import SessionLimits
from runtime.server.gateway_options import (
    FLAG_VALUE,
    GatewayOptions,
    check_gateways,
    read_gateway,
)
from transport.address import is_loopback

if TYPE_CHECKING:
    from transport.zeromq.curve import ServerKeys

BATCH_WAIT_MS = Range(0, 60_000)
DESCRIPTOR = Range(3, 1_048_576)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The keys of ``configs/server/*.yaml``; flags override them.

    On any other address than loopback, every host that reaches the port can connect unless
    ``curve_key`` and ``curve_allow`` are set. Gateways listen on ``gateway_host``; with
    ``curve_key`` they connect to the server with ``gateway_key``.

    Raises:
        ValueError: A value is out of range, one of the two CURVE options is missing, or
            ``gateway_key`` is missing or of no use.
    """

    model_name_or_path: Annotated[
        str,
        Flag(
            "checkpoint folder, hf:ORG/NAME[@REVISION], python:MODULE:FACTORY, "
            "openpi://HOST:PORT or groot://HOST:PORT",
            "-m",
        ),
    ] = DEFAULT_CHECKPOINT
    host: Annotated[str, Flag("address to listen on")] = "127.0.0.1"
    port: Annotated[int, PORT_OR_ANY, Flag("TCP port; 0 chooses a free one", "-p")] = DEFAULT_PORT
    transport: Annotated[
        str, Choice(TRANSPORTS), Flag("transports offered to clients", default="both")
    ] = "auto"
    max_sessions: Annotated[int, COUNT, Flag("largest number of connected clients")] = 64
    max_batch: Annotated[
        int | None, COUNT, Flag("most observations in one inference", default="the model's limit")
    ] = None
    batch_wait_ms: Annotated[
        float,
        BATCH_WAIT_MS,
        Flag("longest wait of a simulation's request for others to join its batch, in ms"),
    ] = 0.0
    session_timeout_s: Annotated[
        float,
        DURATION_S_OR_NONE,
        Flag("seconds without a message until a session is ended", default="never"),
    ] = 0.0
    limits: SessionLimits = field(default_factory=SessionLimits)
    curve_key: Annotated[
        str, Flag("encrypt: the server's secret key file (metronome keys)", metavar="FILE")
    ] = ""
    curve_allow: Annotated[
        str, Flag("folder of the public keys of allowed clients", metavar="DIR")
    ] = ""
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[
        int, PORT_OR_ANY, Flag("port of the Prometheus metrics", "--metrics-port", default="none")
    ] = 0
    gateways: Annotated[
        tuple[GatewayOptions, ...],
        Flag(
            f"also serve clients of another system, as {FLAG_VALUE}; may be repeated",
            name="gateway",
            metavar=FLAG_VALUE,
            read=read_gateway,
        ),
    ] = ()
    gateway_host: Annotated[str, Flag("address that the gateways listen on")] = "127.0.0.1"
    gateway_key: Annotated[
        str,
        Flag("the gateways' secret key file, for a server with --curve_key", metavar="FILE"),
    ] = ""
    checkpoint: Annotated[CheckpointOptions, Group("checkpoint options")] = field(
        default_factory=CheckpointOptions
    )
    upstream: Annotated[UpstreamOptions, Group("another system's server")] = field(
        default_factory=UpstreamOptions
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if bool(self.curve_key) != bool(self.curve_allow):
            raise ValueError("curve_key, curve_allow: got one, expected both or neither")
        if self.gateways and self.curve_key and not self.gateway_key:
            raise ValueError(
                "gateway_key: got none, expected the secret key file of a client in curve_allow, "
                "because the gateways are clients of a server that requires keys"
            )
        if self.gateway_key and not (self.gateways and self.curve_key):
            raise ValueError("gateway_key: got one, expected it with gateways and curve_key only")

    @property
    def transports(self) -> tuple[str, ...]:
        """The transports offered to clients."""
        return ("shm", "zmq") if self.transport == "auto" else (self.transport,)

    def keys(self) -> ServerKeys | None:
        """Read the CURVE keys; None if the sessions are not encrypted.

        Raises:
            KeyFileError: A key file or the folder cannot be used.
        """
        if not self.curve_key:
            return None
        from transport.zeromq.curve import ServerKeys

        return ServerKeys.load(self.curve_key, self.curve_allow)

    def check_gateways(self) -> None:
        """Find what would prevent gateways from starting and can be known without a policy.

        Raises:
            InvalidConfig: A map, a file of keys or an address cannot be used.
            KeyFileError: ``gateway_key`` cannot be used.
        """
        if self.gateway_key:
            from transport.zeromq.curve import ClientKeys

            ClientKeys.load(self.curve_key, self.gateway_key)
        check_gateways(self.gateways, self.gateway_host, self.port)


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """The server's command line: its configuration, and the flags that are not keys of the file.

    Attributes:
        server: The configuration file with the flags applied.
        ready_fd: A pipe inherited from the program that starts the server; it gets one JSON line
            with the addresses when the server is ready.

    Raises:
        ValueError: Gateways would listen beyond this host, without ``insecure``.
    """

    server: ServerConfig
    insecure: Annotated[
        bool,
        Flag("no warning when sessions are not encrypted; gateways may listen beyond this host"),
    ] = False
    config: Annotated[str, Flag("name under configs/server, or a YAML file")] = "default"
    stop_with_stdin: Annotated[bool, Flag("stop when standard input closes")] = False
    ready_fd: Annotated[
        int | None, DESCRIPTOR, Flag("file descriptor that gets the addresses as JSON", hidden=True)
    ] = None
    trace: TraceFile = None
    log_level: LogLevel = "INFO"

    def __post_init__(self) -> None:
        host = self.server.gateway_host
        if self.server.gateways and not self.insecure and not is_loopback(host):
            raise ValueError(
                f"--gateway_host: got {host}, expected a loopback address: gateways have no "
                "encryption. Use a tunnel, or --insecure"
            )
