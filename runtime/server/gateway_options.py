"""Which gateways a server starts: the keys of ``gateways`` and the values of ``--gateway``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from policies.number_ranges import PORT_OR_ANY, RATE_HZ, Choice, check_ranges
from policies.yaml_config import InvalidConfig
from runtime.options.api_keys import ApiKeys
from runtime.options.gateways import (
    DEADLINE_MS,
    DEFAULT_PORTS,
    PROTOCOLS,
    Kind,
    check_api_keys,
    check_demand,
    listen,
    load_observation_keys,
)
from transport.errors import TransportError

FLAG_VALUE = "NAME[:PORT[:CONFIG]]"


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """A gateway that the server starts. All but ``protocol`` are as the gateway's own flags.

    Attributes:
        protocol: Whose clients are served.
        port: TCP port; None for the protocol's own.
        config: Name under ``configs/gateway``, or a YAML file.
        api_keys: File of the keys that clients must have one of.
        kind, rate_hz, deadline_ms: What each client's session declares to the server.

    Raises:
        ValueError: A value is out of range, a robot's demand is incomplete, or there are keys and
            the protocol has no place for them.
    """

    protocol: Annotated[str, Choice(PROTOCOLS)]
    port: Annotated[int | None, PORT_OR_ANY] = None
    config: str = ""
    api_keys: str = ""
    kind: Kind = "sim"
    rate_hz: Annotated[float | None, RATE_HZ] = None
    deadline_ms: Annotated[float | None, DEADLINE_MS] = None

    def __post_init__(self) -> None:
        check_ranges(self)
        check_api_keys(self.protocol, self.api_keys)
        check_demand(self.kind, self.rate_hz, self.deadline_ms)

    def arguments(self) -> list[str]:
        """Return the command line of ``runtime.gateway`` that means these options."""
        flags = {
            "--port": self.port,
            "--config": self.config,
            "--api_keys": self.api_keys,
            "--kind": self.kind,
            "--rate_hz": self.rate_hz,
            "--deadline_ms": self.deadline_ms,
        }
        given = {flag: value for flag, value in flags.items() if value not in (None, "")}
        return [self.protocol, *(f"{flag}={value}" for flag, value in given.items())]


def read_gateway(text: str) -> GatewayOptions:
    """Read a value of ``--gateway``: ``openpi``, ``openpi:8000`` or ``openpi:8000:openpi_droid``.

    An empty port is the protocol's own: ``openpi::openpi_droid``.

    Raises:
        argparse.ArgumentTypeError: It is none of these; says what was got and expected.
    """
    protocol, _, rest = text.partition(":")
    port, _, config = rest.partition(":")
    if port and not (port.isdecimal() and len(port) <= 9):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {FLAG_VALUE}")
    try:
        return GatewayOptions(protocol, int(port) if port else None, config)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}: {error}") from error


def check_gateways(gateways: Sequence[GatewayOptions], host: str, server_port: int) -> None:
    """Find what would prevent gateways from starting and can be known before a policy is loaded.

    A port that is free now may be taken later, so the gateways themselves report that, too.

    Args:
        host: The address that they would listen on.
        server_port: The server's own; 0 for any.

    Raises:
        InvalidConfig: A map or a file of keys cannot be used, or an address cannot be listened on.
    """
    with contextlib.ExitStack() as listeners:  # at the same time: two may have the same port
        for options in gateways:
            try:
                load_observation_keys(options.config)
                if options.api_keys:
                    ApiKeys(Path(options.api_keys))
                port = DEFAULT_PORTS[options.protocol] if options.port is None else options.port
                if port == server_port != 0:
                    raise ValueError(f"port: got {port}, the server's own, expected another one")
                listeners.enter_context(listen(host, port))
            except (InvalidConfig, OSError, ValueError, TransportError) as error:
                raise InvalidConfig(f"the {options.protocol} gateway: {error}") from error
