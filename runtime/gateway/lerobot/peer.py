"""One LeRobot client: its session, what it is served, and its newest observation."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote

from policies.errors import ContractMismatch
from policies.types import PolicyContract
from runtime.errors import ServerLost
from runtime.gateway.client_log import ClientLog
from runtime.gateway.config import GatewayCommand
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.lerobot.messages import (
    Instructions,
    read_instructions,
    read_observation,
    write_actions,
)
from runtime.gateway.observation_map import COLOURS, ObservationMap
from runtime.options.observation_keys import ObservationKeys, StateSource

STATE = "lerobot_features.observation.state"
POSITION = ".pos"
"""What LeRobot appends to a motor's name."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Received:
    """An observation as it was sent.

    Attributes:
        content: The pickle.
        t_ns: When its last byte had arrived, nanoseconds on the monotonic clock.
    """

    content: bytes
    t_ns: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """What one client was promised: how its observations are read, and its longest reply."""

    observations: ObservationMap
    actions_per_chunk: int


class LerobotPeer:
    """A connection of a LeRobot client, as the event loop sees it.

    The session is used by one thread, the peer's own. A call after ``end`` raises ``ServerLost``.

    Args:
        name: gRPC's name of the connection.
        command, keys, log: The gateway's.

    Attributes:
        accepted: None until the client's instructions are accepted.
        receiving: Whether an observation is on its way.
    """

    def __init__(
        self, name: str, command: GatewayCommand, keys: ObservationKeys, log: ClientLog
    ) -> None:
        self.name, self._log = name, log
        self.accepted: Accepted | None = None
        self.receiving, self.episode = False, 0
        self._command, self._keys = command, keys
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"lerobot {name}")
        self._ended: Future[None] | None = None
        self._session: GatewaySession | None = None
        self._newest: Received | None = None
        self._arrived = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether the server knows the client."""
        return self._session is not None

    def offer(self, received: Received) -> None:
        """Keep an observation to be answered in place of an older one."""
        self._newest = received
        self._arrived.set()

    async def newest(self, timeout_s: float) -> Received | None:
        """Take the newest observation; None if none arrives in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._newest is None:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return None
        received, self._newest = self._newest, None
        return received

    async def reset(self) -> None:
        """Start an episode; the client has to send its instructions again.

        Raises:
            TransportError, ContractMismatch, KeyFileError: As ``GatewaySession``.
        """
        self.accepted = self._newest = None
        self.episode += 1
        await self._run(self._reset)

    async def instruct(self, content: bytes) -> None:
        """Compare what the client has and expects with what is served.

        Raises:
            ContractMismatch: It does not fit.
            TransportError: As ``GatewaySession.open``.
        """
        self.accepted = await self._run(self._compare, content)

    async def answer(self, received: Received, accepted: Accepted) -> bytes:
        """Return the pickled actions for a pickled observation.

        Raises:
            PolicyError, RuntimeFault, TransportError: As ``GatewaySession.infer``.
        """
        return await self._run(self._infer, received, accepted)

    def end(self) -> None:
        """End the session once its running request is over. Idempotent."""
        if self._ended is None:
            self._ended = self._worker.submit(self._close)
            self._worker.shutdown(wait=False)

    @property
    def ended(self) -> bool:
        """Whether the session is over, after ``end``."""
        return self._ended is not None and self._ended.done()

    def join(self) -> None:
        """Wait until the session is over, after ``end``."""
        self._worker.shutdown(wait=True)

    # In the session's thread

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        if self._ended is not None:
            raise ServerLost(
                "session: got a call after its end, expected Ready on a new connection"
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, function, *arguments)

    def _reset(self) -> None:
        if self._session is None:
            self._session = GatewaySession(self._command, f"lerobot {plain_address(self.name)}")
        else:
            self._session.reset()

    def _compare(self, content: bytes) -> Accepted:
        instructions = read_instructions(content)
        session = self._open_session()
        contract = session.contract
        accepted = Accepted(
            observation_map(instructions, contract, self._keys), instructions.actions_per_chunk
        )
        session.open()
        self._log.write(
            logging.INFO,
            f"{self.name} expects {instructions.checkpoint!r:.200} as {instructions.policy_type}, "
            f"at most {instructions.actions_per_chunk} of {contract.chunk_size} actions",
        )
        return accepted

    def _infer(self, received: Received, accepted: Accepted) -> bytes:
        sent = read_observation(received.content)
        task = sent.values.get("task", "")
        if not isinstance(task, str):
            raise ContractMismatch("task", type(task).__name__, "text")
        obs = accepted.observations.read(sent.values, timestep=sent.timestep, raw_lang=task)
        obs.t_capture_ns = received.t_ns
        session = self._open_session()
        chunk = session.infer(obs)
        offset, dt_s = chunk.first_action_offset, session.contract.dt_s
        return write_actions(
            chunk.actions[: accepted.actions_per_chunk],
            sent.timestep + offset,
            sent.timestamp + offset * dt_s,
            dt_s,
        )

    def _open_session(self) -> GatewaySession:
        if self._session is None:
            raise ContractMismatch("session", "none", "Ready first")
        return self._session

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def plain_address(name: str) -> str:
    """Return the ``HOST:PORT`` of gRPC's name of a connection, ``ipv4:…`` or ``ipv6:%5B…``."""
    return unquote(name.removeprefix("ipv4:").removeprefix("ipv6:"))


def observation_map(
    instructions: Instructions, contract: PolicyContract, keys: ObservationKeys
) -> ObservationMap:
    """Return how a robot's observations become the policy's.

    Raises:
        ContractMismatch: The policy is of another type, or the robot has other cameras or another
            state.
    """
    if instructions.policy_type != contract.policy_type:
        raise ContractMismatch(
            "policy_type", repr(instructions.policy_type[:80]), repr(contract.policy_type)
        )
    key_of = {name: key for key, name in instructions.renamed.items()}
    used = set()
    for camera in contract.cameras:
        given = keys.cameras.get(camera.name)
        key = given.key if given else key_of.get(camera.name, camera.name)
        used.add(key)
        shape = instructions.cameras.get(key)
        sizes = [(*hw, COLOURS) for hw in camera.accepted_hw]
        if shape is None:
            raise ContractMismatch(
                f"lerobot_features.observation.images.{key}",
                f"cameras {sorted(instructions.cameras)!s:.200}",
                f"the policy's camera {camera.name!r}",
            )
        if shape not in sizes and (shape[1:] + shape[:1]) not in sizes:
            raise ContractMismatch(
                f"lerobot_features.observation.images.{key}",
                f"shape {shape!s:.80}",
                " or ".join(map(str, sizes)),
            )
    extra = sorted(set(instructions.cameras) - used)
    if extra:
        raise ContractMismatch(
            f"lerobot_features.observation.images.{extra[0]:.80}",
            "a camera",
            f"only the policy's cameras, {sorted(used)}",
        )
    names = instructions.state_names
    _check_motors(names, contract)
    mapped = [source.key for source in keys.state if source.key in names]
    if mapped != [name for name in names if name in mapped]:
        raise ContractMismatch(
            f"{STATE}.names", f"{list(names)!s:.200}", f"the order of the map, {mapped!s:.200}"
        )
    if not keys.state:
        if len(names) != contract.state_dim:
            raise ContractMismatch(STATE, f"{len(names)} numbers", f"{contract.state_dim}")
        keys = dataclasses.replace(keys, state=tuple(StateSource(name) for name in names))
    return ObservationMap(
        contract,
        keys,
        image_keys=lambda name: (key_of.get(name, name),),
        state_keys=(),
        part_size=1,
    )


def _check_motors(names: tuple[str, ...], contract: PolicyContract) -> None:
    """Refuse a robot whose motors are not the policy's, in the policy's order.

    LeRobot's client gives an action's numbers to its motors in their order, and sends their names
    as those of the state. In another order an action would move the wrong motors.
    """
    if len(names) != contract.action_dim:
        raise ContractMismatch(
            STATE, f"{len(names)} motors {list(names)!s:.200}", f"{contract.action_dim}, as actions"
        )
    wanted = contract.action_names or contract.state_names
    plain = [name.removesuffix(POSITION) for name in names]
    if wanted and plain != [name.removesuffix(POSITION) for name in wanted]:
        raise ContractMismatch(
            f"{STATE}.names", f"{list(names)!s:.300}", f"{list(wanted)!s:.300}, in this order"
        )
