"""State shared by the parts of a policy server; only the serving thread uses it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from policies.errors import DeviceLost
from runtime.server.cost_model import InferenceCostModel
from runtime.server.loaded_model import LoadedModel
from runtime.server.scheduler import Scheduler
from runtime.server.session_state import SessionState
from transport.handshake_messages import Peer

logger = logging.getLogger(__name__)

REASON_CHARACTERS = 500
"""The longest text of a policy in the reason that clients get."""

AdminCommand = Callable[[Mapping[str, Any], Peer], dict[str, Any]]
"""A command of an operator: takes arguments and the client, returns JSON values.

Raises ``Refused``. It runs in the serving thread, so it must be short.
"""


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Counts since the server was made.

    Attributes:
        answered: Requests whose reply is a chunk.
        failed: Requests whose reply is an error, including ``late`` and ``too_many``.
        superseded: Requests replaced by a newer one of the same session.
        late: Requests that expired before they could be computed.
        too_many: Requests above a session's rate limit.
        resets: Episodes reset.
        refused: Sessions refused.
        batches: Inferences of more than one observation.
        swaps: Replacements of the model.
        sessions: Sessions open now.
    """

    answered: int
    failed: int
    superseded: int
    late: int
    too_many: int
    resets: int
    refused: int
    batches: int
    swaps: int
    sessions: int


@dataclass(slots=True, eq=False)
class ServerState:
    """The state of a server.

    Attributes:
        model: The model that is served now.
        costs: The durations of its inferences.
        scheduler: Orders the waiting requests.
        counts: By the names of ``ServerStatistics``.
        sessions: The sessions that have a policy, by id.
        device_lost: Why the server ends, if its device was lost; None otherwise.
    """

    model: LoadedModel
    costs: InferenceCostModel
    scheduler: Scheduler
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(ServerStatistics.__slots__, 0)
    )
    sessions: dict[int, SessionState] = field(default_factory=dict)
    device_lost: DeviceLost | None = None

    def lose_device(self, error: DeviceLost) -> DeviceLost:
        """Record and log that the device is lost; return the error for clients and for ``serve``.

        A new error, because the traceback of ``error`` refers to the observation's arrays. Only the
        first one counts.
        """
        if self.device_lost is None:
            reason = " ".join(str(error).split())[:REASON_CHARACTERS]
            self.device_lost = DeviceLost(
                f"the policy server has lost its device, and ends: {reason}"
            )
            logger.error("%s", self.device_lost)
        return self.device_lost
