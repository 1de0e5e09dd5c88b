"""The one contract on all three channels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contracts.channel import PATIENCE_S, ChannelContract, Pair
from contracts.frames import CHUNK, OBSERVATION, observation
from transport_rig import connected

from transport.memory import memory_pair


class TestMemory(ChannelContract):
    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        client, server = memory_pair(OBSERVATION, CHUNK)
        with client, server:
            yield Pair(client, server)

    def test_peer_memory_is_not_one_mapping(self, pair: Pair) -> None:
        assert pair.server.peer_memory is None


class TestShm(ChannelContract):
    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        with connected("shm") as pair:
            yield pair

    def test_peer_memory_has_all_that_the_peer_sends(self, pair: Pair) -> None:
        memory = pair.server.peer_memory
        for seed in range(6):
            pair.client.send(observation(seed), seed)
            with pair.server.recv(PATIENCE_S) as message:
                for array in message.arrays.values():
                    begin = array.ctypes.data - memory.ctypes.data
                    assert 0 <= begin <= memory.nbytes - array.nbytes
                    assert memory[begin : begin + array.nbytes].tobytes() == array.tobytes()
                del array
        assert not memory.flags.writeable
        assert pair.client.peer_memory.nbytes != memory.nbytes
        pair.server.close()
        pair.client.close()
        assert pair.server.peer_memory is pair.client.peer_memory is None
        assert memory.any()  # still mapped


class TestZmq(ChannelContract):
    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        with connected("zmq") as pair:
            yield pair

    def test_peer_memory_is_not_one_mapping(self, pair: Pair) -> None:
        assert pair.server.peer_memory is None
