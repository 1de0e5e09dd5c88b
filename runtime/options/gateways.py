"""What a gateway's own command and a server that starts gateways share."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from typing import Literal

from policies.number_ranges import Range
from policies.yaml_config import load_config
from runtime.options.observation_keys import ObservationKeys
from transport.address import bare_host, format_address, resolve

DEFAULT_PORTS: Mapping[str, int] = {
    "ilstudio": 5001,
    "openpi": 8000,
    "lerobot": 8080,
    "groot": 5555,
}
"""Each protocol's own TCP port."""
PROTOCOLS = tuple(DEFAULT_PORTS)
"""Names of the gateways."""
WITH_API_KEYS = ("openpi", "groot")
"""The protocols that have a place for a key."""
DEADLINE_MS = Range(0, 60_000, above=True)
Kind = Literal["robot", "sim"]
"""Kind of a gateway's sessions."""


def load_observation_keys(config: str) -> ObservationKeys:
    """Return the map that ``config`` names, a name or a file; an empty one for an empty name.

    Raises:
        InvalidConfig: There is no such file, or it is no such map.
    """
    return load_config(ObservationKeys, config, kind="gateway") if config else ObservationKeys()


def check_demand(kind: Kind, rate_hz: float | None, deadline_ms: float | None) -> None:
    """Raise ``ValueError`` unless a robot's sessions declare rate and deadline."""
    given = {"rate_hz": rate_hz, "deadline_ms": deadline_ms}
    missing = [name for name, value in given.items() if value is None]
    if kind == "robot" and missing:
        raise ValueError(
            f"kind robot: got no {' and no '.join(missing)}, expected rate_hz and deadline_ms"
        )


def check_api_keys(protocol: str, api_keys: str) -> None:
    """Raise ``ValueError`` if ``api_keys`` is given and the protocol has no place for a key."""
    if api_keys and protocol not in WITH_API_KEYS:
        raise ValueError(
            f"api_keys: got {api_keys}, expected none: {protocol} has no place for keys; "
            f"{' and '.join(WITH_API_KEYS)} have"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address, which shows that a gateway can.

    Raises:
        ValueError: It is taken, or not this machine's.
        TransportError: The host's name is unknown.
    """
    numeric, ipv6 = resolve(bare_host(host), port, listening=True)
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    try:
        return socket.create_server((numeric, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EINVAL)
        raise ValueError(f"{format_address(host, port)}: {reason}") from error
