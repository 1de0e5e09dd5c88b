"""Admission control: whether a server has the capacity for one more session.

A robot declares how often it sends requests (``rate_hz``) and how soon it needs each reply
(``deadline_ms``). A new session is admitted only if the declarations of all robots still hold. Two
bounds apply, to robots only, because simulations use the time that is left:

* Utilisation (Liu and Layland 1973): the sum of the robots' rates, times the duration of one
  inference, is at most ``MAX_ROBOT_LOAD``.
* Response time, without preemption: one simulation's inference may be in progress and every other
  robot may be served first; the sum of these and of its own inference is at most its deadline.

A client that declares nothing is admitted without a guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from policies.flag_builder import Flag
from policies.number_ranges import RATE_HZ_OR_ANY, Range, check_ranges
from runtime.server.cost_model import InferenceCostModel
from runtime.server.rate_limiter import TokenBucket
from transport.errors import Refused

KINDS = ("robot", "sim")
MAX_ROBOT_LOAD = 0.9
"""The fraction of the time that robots may use; the rest is a margin."""
BYTES = Range(1, 1 << 50)
MAX_RATE_HZ, MAX_DEADLINE_MS = 10_000.0, 3_600_000.0


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """The limits of a server on its sessions.

    Attributes:
        message_bytes: The size of one observation.
        total_bytes: The size of the buffers of all sessions together, both directions.
        rate_hz: Requests per second of one session; 0 for no limit.
    """

    message_bytes: Annotated[int, BYTES] = 64 << 20
    total_bytes: Annotated[int, BYTES] = 4 << 30
    rate_hz: Annotated[
        float,
        RATE_HZ_OR_ANY,
        Flag("requests per second of one session", name="max_rate_hz", default="any"),
    ] = 0.0

    def rate_limiter(self) -> TokenBucket | None:
        """A new session's rate limiter; None without a limit."""
        return TokenBucket(self.rate_hz) if self.rate_hz else None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a session declares that it needs.

    Attributes:
        kind: ``robot`` or ``sim``.
        rate_hz: Planned requests per second; 0 if not declared.
        deadline_ms: How soon it needs each reply; infinity if not declared.
        buffer_bytes: The size of its buffers, both directions.
    """

    kind: str = "sim"
    rate_hz: float = 0.0
    deadline_ms: float = math.inf
    buffer_bytes: int = 0

    @property
    def is_robot(self) -> bool:
        """Whether the session is a robot's, which is served before simulations."""
        return self.kind == "robot"

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], buffer_bytes: int) -> Demand:
        """Read the declaration in a handshake's attributes, which are not trusted.

        Raises:
            Refused: A value is invalid; names it, with the valid ones.
        """
        kind = attributes.get("kind", "sim")
        if kind not in KINDS:
            raise Refused("kind", repr(kind)[:80], f"one of {KINDS}")
        rate_hz = _number(attributes, "rate_hz", MAX_RATE_HZ, 0.0)
        deadline_ms = _number(attributes, "deadline_ms", MAX_DEADLINE_MS, math.inf)
        return cls(kind, rate_hz, deadline_ms, buffer_bytes)


def _number(attributes: Mapping[str, Any], name: str, maximum: float, default: float) -> float:
    value = attributes.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= maximum:
        raise Refused(name, repr(value)[:80], f"a number above 0 and up to {maximum:g}")
    return float(value)


def admit(
    newcomer: Demand, present: Iterable[Demand], limits: SessionLimits, costs: InferenceCostModel
) -> None:
    """Check that the server has the capacity for ``newcomer`` beside the sessions ``present``.

    Raises:
        Refused: A limit or a robot's declaration would not hold; has the numbers.
    """
    sessions = [*present, newcomer]
    total = sum(demand.buffer_bytes for demand in sessions)
    if total > limits.total_bytes:
        raise Refused(
            "buffers",
            f"{newcomer.buffer_bytes} bytes, with the other sessions' {total}",
            f"at most {limits.total_bytes} for all sessions",
        )
    if limits.rate_hz and newcomer.rate_hz > limits.rate_hz:
        raise Refused("rate_hz", f"{newcomer.rate_hz:g}", f"at most {limits.rate_hz:g}")
    if not newcomer.is_robot:
        return
    single_ms = costs.median(1) / 1e6
    robots = [demand for demand in sessions if demand.is_robot]
    load = sum(demand.rate_hz for demand in robots) * single_ms / 1e3
    if newcomer.rate_hz and load > MAX_ROBOT_LOAD:
        others_hz = sum(demand.rate_hz for demand in robots if demand is not newcomer)
        left_hz = max(0.0, 1e3 * MAX_ROBOT_LOAD / single_ms - others_hz)
        raise Refused(
            "rate_hz",
            f"{newcomer.rate_hz:g} requests/s of {single_ms:.3g} ms each: with the other robots "
            f"{100 * load:.0f} % of the time",
            f"at most {100 * MAX_ROBOT_LOAD:.0f} %: {left_hz:.3g} requests/s for this one "
            "(--ensemble_stride and --n_action_steps ask less often)",
        )
    # The inference in progress, then one for each robot.
    response_ms = (1 + len(robots)) * costs.near_max(1) / 1e6
    for robot in robots:
        if response_ms > robot.deadline_ms:
            whose = "its own" if robot is newcomer else "another robot's"
            raise Refused(
                "deadline_ms",
                f"{whose} {robot.deadline_ms:g}, where {len(robots)} robots of "
                f"{costs.near_max(1) / 1e6:.3g} ms each and one inference in progress take "
                f"{response_ms:.3g}",
                f"at least {response_ms:.3g}, or fewer robots",
            )
