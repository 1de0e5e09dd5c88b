"""Loads another checkpoint while the server serves the old one, then replaces the model.

A separate thread loads the policy, compares its contract and warms it up, with CUDA graph capture
and compilation. The serving thread then replaces the model between two inferences. After any error
before that the old model stays; only ``DeviceLost`` ends the server. The thread shares the machine
with the running model, so replies take longer while it works; ``bench/test_many_clients.py``
measures by how much.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from policies.errors import DeviceLost
from policies.types import Policy
from policies.weights_hash import info_with_hash
from runtime.server.admin_token import AdminToken
from runtime.server.cost_model import InferenceCostModel
from runtime.server.loaded_model import close_policy
from runtime.server.state import AdminCommand
from runtime.server.warmup import measure_costs, warm_up
from transport.errors import Refused
from transport.handshake_messages import Peer
from transport.zeromq.curve import is_operator

logger = logging.getLogger(__name__)

CLOSE_S = 30.0
BUSY = ("loading", "warming up", "switching")


@dataclass(frozen=True, slots=True)
class LoadState:
    """The progress of a reload.

    Attributes:
        checkpoint: The last requested checkpoint; empty before the first.
        state: ``none``, one of ``BUSY``, ``serving`` or ``failed``.
        error: Why it failed; empty otherwise.
        policy_id: The id of the new policy once it is served; 0 before.
        took_s: Seconds from the request until it was served or failed; 0 before.
    """

    checkpoint: str = ""
    state: str = "none"
    error: str = ""
    policy_id: int = 0
    took_s: float = 0.0


class ModelReloader:
    """Loads checkpoints in a thread, and replaces the server's model by them.

    Args:
        load: Loads the policy of a checkpoint; raises ``PolicyError``.
        token: Clients with this token may load checkpoints, and so may clients with an operator's
            key; None for the latter only.
        check: Checks that a policy may replace the served one; raises ``PolicyError``.
        swap: Replaces the served policy, given the new one and its inference durations; returns its
            id. Called in the serving thread.
        call_in_serving_thread: Runs a function in the serving thread; raises ``TimeoutError``.
        report_device_lost: Called with a ``DeviceLost`` of the load: the served model uses the same
            device, so the server ends.
        max_batch: As ``PolicyServer``.
    """

    def __init__(
        self,
        load: Callable[[str], Policy],
        token: AdminToken | None,
        *,
        check: Callable[[Policy], None],
        swap: Callable[[Policy, InferenceCostModel], int],
        call_in_serving_thread: Callable[[Callable[[], int]], int],
        report_device_lost: Callable[[DeviceLost], None],
        max_batch: int | None = None,
    ) -> None:
        self._load, self._token, self._max_batch = load, token, max_batch
        self._check, self._swap = check, swap
        self._call_in_serving_thread = call_in_serving_thread
        self._report_device_lost = report_device_lost
        self.state = LoadState()
        self._thread: threading.Thread | None = None
        self._lost: DeviceLost | None = None

    @property
    def admin_commands(self) -> dict[str, AdminCommand]:
        """The commands ``load`` and ``load_state``, by name."""
        return {"load": self._load_command, "load_state": lambda *_: dataclasses.asdict(self.state)}

    def start(self, checkpoint: str) -> None:
        """Start to load ``checkpoint``; ``state`` has the progress.

        Raises:
            Refused: Another checkpoint is being loaded.
        """
        if self.state.state in BUSY:
            raise Refused("load", checkpoint, f"the end of loading {self.state.checkpoint}")
        self.state = LoadState(checkpoint, BUSY[0])
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> LoadState:
        """Wait for the end of a load, at most ``timeout_s``; return the state."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self.state

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Wait for a load in progress, at most ``timeout_s``. Call it after ``serve`` returned."""
        self.wait(timeout_s)

    def _load_command(self, arguments: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
        allowed = self._token is not None and self._token.matches(arguments.get("token"))
        if not allowed and not is_operator(peer.user):
            logger.warning("refused an admin command from %s: not an operator", peer)
            raise Refused(
                "operator",
                str(peer) or "an unknown client",
                "the user who runs the server, on its machine, or a key listed under operators/",
            )
        checkpoint = arguments.get("checkpoint")
        if not isinstance(checkpoint, str) or not checkpoint:
            raise Refused("checkpoint", repr(checkpoint)[:80], "a path on the server's machine")
        if checkpoint.startswith("python:"):
            raise Refused(
                "checkpoint",
                checkpoint,
                "a checkpoint: python: is accepted on the command line only",
            )
        logger.info("admin command from %s: load %s", peer, checkpoint)
        self.start(checkpoint)
        return dataclasses.asdict(self.state)

    def _run(self) -> None:
        began_s = time.monotonic()
        policy: Policy | None = None
        try:
            policy = self._load(self.state.checkpoint)
            self._check(policy)
            self._update(state="warming up")
            info_with_hash(policy)  # here, so that the serving thread need not wait for it
            costs = measure_costs(policy, warm_up(policy), self._max_batch)
            self._update(state="switching")
            replacement = policy
            policy_id = self._call_in_serving_thread(lambda: self._swap(replacement, costs))
        except DeviceLost as error:
            # The policy is not closed, and the traceback keeps it from being freed: on a lost
            # device both may hang.
            self._lost = error
            self._report_device_lost(error)
            self._fail(str(error), began_s)
        except Exception as error:  # a checkpoint can fail in any way; the old model stays
            if policy is not None:
                close_policy(policy)
            reason = str(error) or repr(error)
            if isinstance(error, TimeoutError):
                reason = f"{reason}, not switched; try again"
            self._fail(reason, began_s)
        else:
            self._update(state="serving", policy_id=policy_id, took_s=time.monotonic() - began_s)

    def _fail(self, reason: str, began_s: float) -> None:
        logger.warning("%s was not loaded: %s", self.state.checkpoint, reason)
        self._update(state="failed", error=reason, took_s=time.monotonic() - began_s)

    def _update(self, **changes: Any) -> None:
        self.state = dataclasses.replace(self.state, **changes)
