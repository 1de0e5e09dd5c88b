"""The gateways' configuration and their command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from policies.flag_builder import Flag, Group
from policies.number_ranges import (
    COUNT,
    DURATION_S,
    PORT_OR_ANY,
    RATE_HZ,
    Choice,
    Range,
    check_ranges,
)
from runtime.options.connection import ConnectionOptions
from runtime.options.defaults import DEFAULT_PORT
from runtime.options.gateways import DEADLINE_MS, DEFAULT_PORTS, PROTOCOLS, Kind, check_demand
from runtime.options.shared_flags import LogLevel

PORTS = ", ".join(f"{protocol} {port}" for protocol, port in DEFAULT_PORTS.items())
DESCRIPTOR = Range(3, 1_048_576)


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How the gateway's sessions present themselves to the server.

    Raises:
        ValueError: A value is out of range, or a robot's demand is incomplete.
    """

    kind: Annotated[Kind, Flag("kind of the sessions; robots are served first")] = "sim"
    rate_hz: Annotated[
        float | None, RATE_HZ, Flag("requests per second of each session, for admission")
    ] = None
    deadline_ms: Annotated[
        float | None, DEADLINE_MS, Flag("ms until a reply is needed, for admission")
    ] = None
    timeout_s: Annotated[float, DURATION_S, Flag("seconds to wait for a reply")] = 30.0

    def __post_init__(self) -> None:
        check_ranges(self)
        check_demand(self.kind, self.rate_hz, self.deadline_ms)


@dataclass(frozen=True, slots=True)
class GatewayCommand:
    """A gateway's command line.

    Attributes:
        ready_fd: A pipe inherited from the program that starts the gateway; it gets one JSON line
            with the address when the gateway is ready.
    """

    protocol: Annotated[str, Choice(PROTOCOLS), Flag("whose clients are served", positional=True)]
    server: Annotated[str, Flag("the policy server, HOST:PORT")] = f"127.0.0.1:{DEFAULT_PORT}"
    host: Annotated[str, Flag("address to listen on")] = "127.0.0.1"
    port: Annotated[
        int | None,
        PORT_OR_ANY,
        Flag("TCP port; 0 chooses a free one", "-p", default=PORTS),
    ] = None
    config: Annotated[
        str, Flag("name under configs/gateway, or a YAML file", default="the protocol's own names")
    ] = ""
    api_keys: Annotated[
        str, Flag("file of the keys that clients must have one of, a line each", metavar="FILE")
    ] = ""
    insecure: Annotated[bool, Flag("listen beyond this host: the protocols have no encryption")] = (
        False
    )
    max_clients: Annotated[int, COUNT, Flag("largest number of connected clients")] = 64
    sessions: Annotated[SessionOptions, Group("sessions")] = field(default_factory=SessionOptions)
    connection: Annotated[
        ConnectionOptions, Group("connection to the server", without=("resize", "jpeg_quality"))
    ] = field(default_factory=ConnectionOptions)
    stop_with_stdin: Annotated[bool, Flag("stop when standard input closes")] = False
    ready_fd: Annotated[
        int | None, DESCRIPTOR, Flag("file descriptor that gets the address as JSON", hidden=True)
    ] = None
    log_level: LogLevel = "INFO"
