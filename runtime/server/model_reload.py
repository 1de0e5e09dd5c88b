"""Another checkpoint for a server that goes on serving meanwhile.

A thread of its own loads it, compares the contract and warms it up (captures and compilations
included); the serving thread then puts it in place between two inferences. Whatever goes wrong
before that leaves the old one serving. The thread shares the machine with the running model: while
it works, answers take longer, which ``bench/test_many_clients.py`` measures.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from policies.types import Policy
from runtime.server.admin_token import AdminToken
from runtime.server.cost_model import InferenceCostModel
from runtime.server.model import close
from runtime.server.state import Order
from runtime.server.warmup import measure_costs, warm_up
from transport.errors import Refused
from transport.handshake_messages import Peer
from transport.zeromq.curve import is_operator

logger = logging.getLogger(__name__)

CLOSE_S = 30.0
BUSY = ("loading", "warming up", "switching")


@dataclass(frozen=True, slots=True)
class LoadState:
    """How far it is.

    Attributes:
        checkpoint: The last one that was asked for; empty before the first.
        state: ``none``, one of ``BUSY``, ``serving`` or ``failed``.
        error: Why it failed.
        policy_id: What clients know it by, once it serves.
        took_s: Since it was asked for, until it was there or failed.
    """

    checkpoint: str = ""
    state: str = "none"
    error: str = ""
    policy_id: int = 0
    took_s: float = 0.0


class ModelReloader:
    """Loads checkpoints for a server that goes on serving.

    Args:
        load: A checkpoint's policy; raises ``PolicyError``.
        token: What gives the right to order; operators' keys do, too.
        check: Whether a policy could take the place of what is served; raises ``PolicyError``.
        swap: Serves a policy from the next inference on, and what its inferences take; its id.
            For the serving thread.
        call_in_serving_thread: Runs a function there; raises ``TimeoutError``.
        max_batch: As the server's.
    """

    def __init__(
        self,
        load: Callable[[str], Policy],
        token: AdminToken | None,
        *,
        check: Callable[[Policy], None],
        swap: Callable[[Policy, InferenceCostModel], int],
        call_in_serving_thread: Callable[[Callable[[], int]], int],
        max_batch: int | None = None,
    ) -> None:
        self._load, self._token, self._max_batch = load, token, max_batch
        self._check, self._swap = check, swap
        self._call_in_serving_thread = call_in_serving_thread
        self.state = LoadState()
        self._thread: threading.Thread | None = None

    @property
    def orders(self) -> dict[str, Order]:
        """What operators may ask for, by name."""
        return {"load": self._order, "load_state": lambda *_: dataclasses.asdict(self.state)}

    def start(self, checkpoint: str) -> None:
        """Begin to load ``checkpoint``; ``state`` says how it goes.

        Raises:
            Refused: Another one is being loaded.
        """
        if self.state.state in BUSY:
            raise Refused("load", checkpoint, f"the end of loading {self.state.checkpoint}")
        self.state = LoadState(checkpoint, BUSY[0])
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> LoadState:
        """For its end, at most so long."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self.state

    def close(self) -> None:
        """Wait for what is being loaded. After ``serve`` has returned."""
        self.wait(CLOSE_S)

    def _order(self, arguments: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
        allowed = self._token is not None and self._token.matches(arguments.get("token"))
        if not allowed and not is_operator(peer.user):
            logger.warning("refused an order of %s: not an operator", peer)
            raise Refused(
                "operator",
                str(peer) or "somebody",
                "whoever runs the server, on its machine, or a key listed under operators/",
            )
        checkpoint = arguments.get("checkpoint")
        if not isinstance(checkpoint, str) or not checkpoint:
            raise Refused("checkpoint", repr(checkpoint)[:80], "a path on the server's machine")
        if checkpoint.startswith("python:"):
            raise Refused("checkpoint", checkpoint, "a checkpoint: code comes by command line only")
        logger.info("%s orders: load %s", peer, checkpoint)
        self.start(checkpoint)
        return dataclasses.asdict(self.state)

    def _run(self) -> None:
        began_s = time.monotonic()
        policy: Policy | None = None
        try:
            policy = self._load(self.state.checkpoint)
            self._check(policy)
            self._step(state="warming up")
            costs = measure_costs(policy, warm_up(policy), self._max_batch)
            self._step(state="switching")
            successor = policy
            number = self._call_in_serving_thread(lambda: self._swap(successor, costs))
        except Exception as error:  # a checkpoint can fail in any way; the old one serves on
            if policy is not None:
                close(policy)
            logger.warning("%s was not loaded: %s", self.state.checkpoint, error)
            reason = str(error) or repr(error)
            if isinstance(error, TimeoutError):
                reason = f"{reason}, not switched; try again"
            self._step(state="failed", error=reason, took_s=time.monotonic() - began_s)
        else:
            self._step(state="serving", policy_id=number, took_s=time.monotonic() - began_s)

    def _step(self, **changes: Any) -> None:
        self.state = dataclasses.replace(self.state, **changes)
