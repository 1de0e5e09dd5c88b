"""Serves the clients of NVIDIA Isaac GR00T: ZMQ, MessagePack, ``.npy`` arrays.

The clients are REQ sockets, and all of them share one ROUTER socket. It is used by one thread only,
which never waits for the policy: each client has a thread of its own that does.

A ROUTER socket does not report disconnects. Its monitor reports them by file descriptor, and each
message has its connection's; heartbeats make a dead host a disconnect. So a session ends with its
connection, and an idle one is kept.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import queue
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from policies.types import PolicyContract
from runtime.gateway.config import GatewayCommand
from runtime.gateway.groot.client import GrootClient, GrootRequests
from runtime.gateway.groot.modalities import GrootModalities
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ObservationKeys
from runtime.wire_formats.npy_arrays import pack
from transport.address import bare_host, format_address, resolve
from transport.zeromq.client_socket import HEARTBEAT_TIMEOUT_MS, LINGER_MS, configure

logger = logging.getLogger(__name__)

ROOM_BYTES = 64 * 1024**2
"""Room for pictures that the policy does not take: ten of 1920x1080 and more. What is shorter is
answered with what was expected. ZMQ disconnects the sender of a longer message before there is
memory for it, and gives no way to answer; GR00T's client then waits until its own timeout, and by
default for ever. More room would be memory that each connection may take."""
MAX_FRAMES = 4
"""Frames of a request: an optional number and an empty frame, then the request."""
CLOSE_S = 2.0
"""How long ``close`` waits for requests that are being computed."""
QUEUED = 1
"""Messages that ZMQ keeps of each client, and replies to it. A REQ socket has one."""


class GrootGateway:
    """A ROUTER socket for the clients of GR00T.

    Endpoints: ``get_action``, ``reset``, ``ping``, ``get_modality_config``; there is no ``kill``.
    Each connection has one session, named ``groot N``, and one request at a time: another one is
    refused until the first has its reply. Whatever is wrong is answered ``{"error": text}``.

    Args:
        command: Where to listen, the server, and how many clients there may be.
        keys: The observations' keys; see ``GrootModalities``.
        api_keys: Keys of which each request must have one as ``api_token``; None for no keys.
        contract: The served policy's.

    Attributes:
        port: The TCP port that it listens on.

    Raises:
        InvalidConfig: ``keys`` does not fit the contract.
        OSError: The address is taken or not this machine's.
        TransportError: The host's name is unknown.
    """

    def __init__(
        self,
        command: GatewayCommand,
        keys: ObservationKeys,
        api_keys: ApiKeys | None,
        contract: PolicyContract,
    ) -> None:
        self._command, self._api_keys, self._contract = command, api_keys, contract
        self._modalities = GrootModalities(contract, keys)
        self._clients: dict[bytes, GrootClient] = {}
        self._by_fd: dict[int, GrootClient] = {}
        self._ending: set[GrootClient] = set()
        self._replies: queue.SimpleQueue[tuple[GrootClient, list[bytes] | None]]
        self._replies = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._stopped = self._closed = False
        self._logged: set[str] = set()
        self._context = zmq.Context()
        try:
            self._socket, self._monitor = _bind(self._context, command, max_message(contract))
        except BaseException:
            self._context.destroy(linger=0)
            raise
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(endpoint.rstrip("\0").rpartition(":")[2])
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def serve(self) -> None:
        """Serve clients until ``stop``."""
        poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake_fd):
            poller.register(source, zmq.POLLIN)
        while not self._stopped:
            poller.poll()
            self._step()

    def stop(self) -> None:
        """Make ``serve`` return soon. For a signal handler or another thread. Idempotent."""
        self._stopped = True
        if not self._closed:
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """End all sessions and free the address. Call it after ``serve``. Idempotent.

        A session whose request is not answered within ``CLOSE_S`` ends with its reply, or with the
        process.
        """
        if self._closed:
            return
        self._closed = True
        for client in list(self._clients.values()):
            self._end(client)
        self._socket.disable_monitor()
        self._context.destroy(linger=LINGER_MS)
        deadline_s = time.monotonic() + CLOSE_S
        ended = [client.join(max(0.0, deadline_s - time.monotonic())) for client in self._ending]
        if all(ended):  # else a thread still writes to it
            os.close(self._wake_fd)

    # The loop

    def _step(self) -> None:
        """Send what is computed, take at most one message, and end who is gone."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._send_replies()
        received = self._receive()
        # Only now: a descriptor that has a new connection's message was reported before that
        # message arrived, if it was another connection's.
        for fd in self._disconnected():
            client = self._by_fd.pop(fd, None)
            if client is not None:
                self._end(client)
        if received is not None:
            self._take(*received)

    def _receive(self) -> tuple[bytes, int, list[zmq.Frame]] | None:
        """Return identity, descriptor and frames of the next message; frames empty if too many."""
        try:
            identity = self._socket.recv(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        frames: list[zmq.Frame] = []
        more, count = identity.more, 0
        while more:
            frame = self._socket.recv(zmq.DONTWAIT, copy=False)
            more, count = frame.more, count + 1
            if count <= MAX_FRAMES:
                frames.append(frame)
        fd = frames[-1].get(zmq.SRCFD) if frames else -1
        return identity.bytes, int(fd), frames if count <= MAX_FRAMES else []

    def _disconnected(self) -> list[int]:
        """Return the descriptors of the connections that ended since the last call."""
        found = []
        with contextlib.suppress(zmq.Again):
            while True:
                event = recv_monitor_message(self._monitor, zmq.DONTWAIT)
                found.append(int(event["value"]))
        return found

    def _take(self, identity: bytes, fd: int, frames: list[zmq.Frame]) -> None:
        """Give a request to its client's thread, or refuse it."""
        envelope = [frame.bytes for frame in frames[:-1]]
        if not envelope or envelope[-1] or fd < 0:
            logger.debug("a message of %d frames that is not from a REQ socket", len(frames))
            return
        client = self._clients.get(identity)
        if client is None:
            if len(self._clients) + len(self._ending) >= self._command.max_clients:
                most = self._command.max_clients
                self._refuse(
                    identity, envelope, f"clients: got {most + 1}, expected at most {most}"
                )
                return
            client = self._add(identity)
        self._by_fd[fd] = client
        if client.busy:
            self._refuse(identity, envelope, "request: got two, expected one until its reply")
            return
        client.busy = True
        client.submit(envelope, frames[-1].buffer)

    def _add(self, identity: bytes) -> GrootClient:
        name = f"groot {next(self._numbers)}"
        requests = GrootRequests(
            self._command, name, self._api_keys, self._contract, self._modalities
        )
        client = self._clients[identity] = GrootClient(identity, name, requests, self._post)
        logger.info("%s is a new client", name)
        return client

    def _end(self, client: GrootClient) -> None:
        if self._clients.get(client.identity) is client:
            del self._clients[client.identity]
            self._ending.add(client)
            client.end()
            logger.info("%s is gone", client.name)

    # Replies

    def _post(self, client: GrootClient, reply: list[bytes] | None) -> None:
        """Have a reply sent; called by the clients' threads."""
        self._replies.put((client, reply))
        os.eventfd_write(self._wake_fd, 1)

    def _send_replies(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                client, reply = self._replies.get_nowait()
                if reply is None:
                    self._ending.discard(client)
                    continue
                client.busy = False
                if self._clients.get(client.identity) is client:
                    self._send(client.identity, reply)
                    if not client.requests.admitted:  # it must not keep a place
                        self._end(client)

    def _refuse(self, identity: bytes, envelope: list[bytes], error: str) -> None:
        self._warn_once(f"a request was refused: {error}")
        self._send(identity, [*envelope, pack({"error": error})])

    def _warn_once(self, text: str) -> None:
        """Log one of a few texts: once, however often a client gives cause."""
        if text not in self._logged:
            self._logged.add(text)
            logger.warning("%s", text)

    def _send(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            self._socket.send_multipart([identity, *frames], zmq.DONTWAIT)
        except zmq.Again:
            self._warn_once("a client does not read its replies: one was dropped")
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            if identity in self._clients:  # it left before its request was read
                self._end(self._clients[identity])


def max_message(contract: PolicyContract) -> int:
    """Return the longest request in bytes: some times what the policy needs, and room."""
    pixels = sum(max(h * w for h, w in camera.accepted_hw) for camera in contract.cameras)
    return 4 * (3 * pixels + 8 * contract.state_dim) + ROOM_BYTES


def _bind(
    context: zmq.Context[zmq.Socket[bytes]], command: GatewayCommand, max_bytes: int
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Return the bound ROUTER socket and its monitor."""
    host, port = bare_host(command.host), command.port or 0
    numeric, ipv6 = resolve(host, port, listening=True)
    socket = context.socket(zmq.ROUTER)
    configure(socket)
    socket.set(zmq.MAXMSGSIZE, max_bytes)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    socket.set(zmq.HANDSHAKE_IVL, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.RCVHWM, QUEUED)
    socket.set(zmq.SNDHWM, QUEUED)
    socket.set(zmq.IPV6, int(ipv6))
    monitor = socket.get_monitor_socket(zmq.Event.DISCONNECTED)
    endpoint = format_address(numeric, port)
    try:
        socket.bind(f"tcp://{endpoint if port else endpoint[:-1] + '*'}")
    except zmq.ZMQError as error:
        number = error.errno or errno.EINVAL
        raise OSError(number, os.strerror(number), format_address(host, port)) from error
    return socket, monitor
