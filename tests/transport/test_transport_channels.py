"""The one contract on all three channels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contracts.channel import ChannelContract, Pair
from contracts.frames import CHUNK, OBSERVATION
from transport_rig import connected

from transport.memory import memory_pair


class TestMemory(ChannelContract):
    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        client, server = memory_pair(OBSERVATION, CHUNK)
        with client, server:
            yield Pair(client, server)


class TestShm(ChannelContract):
    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        with connected("shm") as pair:
            yield pair


class TestZmq(ChannelContract):
    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        with connected("zmq") as pair:
            yield pair
