"""What the parts of a policy server share; only its serving thread touches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.server.cost_model import InferenceCostModel
from runtime.server.model import LoadedModel
from runtime.server.scheduler import Scheduler
from runtime.server.session import SessionState
from transport.handshake_messages import Peer

Order = Callable[[Mapping[str, Any], Peer], dict[str, Any]]
"""What an operator asks for: arguments and who asks; the answer, JSON values. Raises ``Refused``.
In the serving thread: what takes time belongs elsewhere."""


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Counts since the server was made.

    Attributes:
        answered: Requests answered with a chunk.
        failed: Requests answered with an error, those that were late or too many among them.
        superseded: Requests passed over for a newer one of the same session.
        late: Requests whose time was up before they could be computed.
        too_many: Requests beyond what a session may make.
        resets: Episodes reset.
        refused: Clients that were not let in.
        batches: Inferences of more than one observation.
        swaps: How often the model was replaced.
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
    """State of a server.

    Attributes:
        model: What is served now.
        costs: What its inferences take.
        scheduler: Whose turn it is.
        counts: By the names of ``ServerStatistics``.
        sessions: Those that were given a policy, by id.
    """

    model: LoadedModel
    costs: InferenceCostModel
    scheduler: Scheduler
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(ServerStatistics.__slots__, 0)
    )
    sessions: dict[int, SessionState] = field(default_factory=dict)
