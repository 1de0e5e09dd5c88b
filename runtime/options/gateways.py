"""What a gateway's own command and a server that starts gateways share."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from policies.number_ranges import Choice, Range
from policies.yaml_config import load_config
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
LAYOUTS = ("auto", "hwc", "chw")
"""Order of an image's axes; "auto": told by its shape."""
STATE_INDEX = Range(0, 10_000)
Kind = Literal["robot", "sim"]
"""Kind of a gateway's sessions."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where a camera's image is in a foreign observation.

    Attributes:
        key: Its key; ``/`` separates the keys of nested maps.
        layout: One of ``LAYOUTS``.
    """

    key: str
    layout: Annotated[str, Choice(LAYOUTS)] = "auto"


@dataclass(frozen=True, slots=True)
class StateSource:
    """A slice of a foreign observation that is a part of the state.

    Attributes:
        key: The array's key; ``/`` separates the keys of nested maps.
        start, stop: The slice of the flattened array; the whole array by default.

    Raises:
        ValueError: ``stop`` is not above ``start``.
    """

    key: str
    start: Annotated[int, STATE_INDEX] = 0
    stop: Annotated[int | None, STATE_INDEX] = None

    def __post_init__(self) -> None:
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop: got {self.stop}, expected more than start {self.start}")


@dataclass(frozen=True, slots=True)
class ObservationKeys:
    """The keys of ``configs/gateway/*.yaml``: where a foreign observation has the policy's inputs.

    What is left out is found by the protocol's own names.

    Attributes:
        cameras: By the contract's camera name.
        state: The parts of the state, in the contract's order.
    """

    cameras: Mapping[str, ImageSource] = field(default_factory=dict)
    state: tuple[StateSource, ...] = ()


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
