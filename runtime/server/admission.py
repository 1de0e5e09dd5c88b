"""Who may have a session: what it would cost the others, in numbers.

A robot that says how often it will ask (``rate_hz``) and how soon it needs its answers
(``deadline_ms``) is held to account for both, and so is every newcomer after it. Two bounds, both
for robots alone, because simulations take what is left:

* Utilisation (Liu and Layland 1973): the robots' rates times what one inference costs is at most
  ``MOST_LOAD``.
* Response: non-preemptive, each robot may find one simulation's inference in progress and every
  other robot before it; that and its own inference fit its deadline.

What a client does not declare it cannot be promised; it is let in and served as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from policies.flags import Flag
from policies.number_ranges import RATE_HZ_OR_ANY, Range, check_ranges
from runtime.server.cost_model import InferenceCostModel
from runtime.server.rate_limiter import TokenBucket
from transport.errors import Refused

KINDS = ("robot", "sim")
MOST_LOAD = 0.9
"""Of the time, for robots; the rest is for what cannot be foreseen."""
BYTES = Range(1, 1 << 50)
MOST_HZ, MOST_DEADLINE_MS = 10_000.0, 3_600_000.0


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Of a server.

    Attributes:
        message_bytes: Of one observation.
        total_bytes: Of all sessions' observations and answers together, as their buffers hold them.
    """

    message_bytes: Annotated[int, BYTES] = 64 << 20
    total_bytes: Annotated[int, BYTES] = 4 << 30
    rate_hz: Annotated[
        float,
        RATE_HZ_OR_ANY,
        Flag("requests per second of one session", name="max_rate_hz", default="any"),
    ] = 0.0

    def pace(self) -> TokenBucket | None:
        """For a new session."""
        return TokenBucket(self.rate_hz) if self.rate_hz else None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a session wants.

    Attributes:
        kind: ``robot`` or ``sim``.
        rate_hz: Requests per second that it means to make; 0 where it does not say.
        deadline_ms: How soon it needs its answers; infinity where it does not say.
        buffer_bytes: What its buffers hold.
    """

    kind: str = "sim"
    rate_hz: float = 0.0
    deadline_ms: float = math.inf
    buffer_bytes: int = 0

    @property
    def robot(self) -> bool:
        return self.kind == "robot"

    @classmethod
    def read(cls, attributes: Mapping[str, Any], buffer_bytes: int) -> Demand:
        """From a handshake's attributes, which are not trusted.

        Raises:
            Refused: Values that cannot be.
        """
        kind = attributes.get("kind", "sim")
        if kind not in KINDS:
            raise Refused("kind", repr(kind)[:80], f"one of {KINDS}")
        rate_hz = _number(attributes, "rate_hz", MOST_HZ, 0.0)
        deadline_ms = _number(attributes, "deadline_ms", MOST_DEADLINE_MS, math.inf)
        return cls(kind, rate_hz, deadline_ms, buffer_bytes)


def _number(attributes: Mapping[str, Any], name: str, most: float, absent: float) -> float:
    value = attributes.get(name)
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise Refused(name, repr(value)[:80], f"a number above 0 and up to {most:g}")
    return float(value)


def admit(
    newcomer: Demand, present: Iterable[Demand], limits: SessionLimits, costs: InferenceCostModel
) -> None:
    """Let ``newcomer`` in beside ``present``, or say with the numbers why not.

    Raises:
        Refused: It would break a limit, or somebody's budget.
    """
    everybody = [*present, newcomer]
    total = sum(demand.buffer_bytes for demand in everybody)
    if total > limits.total_bytes:
        raise Refused(
            "buffers",
            f"{newcomer.buffer_bytes} bytes, with the other sessions' {total}",
            f"at most {limits.total_bytes} for all sessions",
        )
    if limits.rate_hz and newcomer.rate_hz > limits.rate_hz:
        raise Refused("rate_hz", f"{newcomer.rate_hz:g}", f"at most {limits.rate_hz:g}")
    if not newcomer.robot:
        return
    single_ms = costs.usual(1) / 1e6
    robots = [demand for demand in everybody if demand.robot]
    load = sum(demand.rate_hz for demand in robots) * single_ms / 1e3
    if newcomer.rate_hz and load > MOST_LOAD:
        raise Refused(
            "rate_hz",
            f"{newcomer.rate_hz:g} requests/s of {single_ms:.3g} ms each: with the other robots "
            f"{100 * load:.0f} % of the time",
            f"at most {100 * MOST_LOAD:.0f} %",
        )
    # One simulation's inference in progress, then every robot's, its own last.
    response_ms = (1 + len(robots)) * costs.most(1) / 1e6
    for robot in robots:
        if response_ms > robot.deadline_ms:
            whose = "its own" if robot is newcomer else "another robot's"
            raise Refused(
                "deadline_ms",
                f"{whose} {robot.deadline_ms:g}, where {len(robots)} robots of "
                f"{costs.most(1) / 1e6:.3g} ms each and one inference in progress take "
                f"{response_ms:.3g}",
                f"at least {response_ms:.3g}, or fewer robots",
            )
