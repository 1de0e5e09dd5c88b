"""What every ``Channel`` does: subclass ``ChannelContract`` and provide ``pair``."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from contracts.frames import OBSERVATION, chunk, observation

from transport.base_channel import SLOTS
from transport.channel import MAX_BODY_BYTES, Channel, Kind, Message
from transport.errors import (
    ChannelClosed,
    PeerGone,
    SchemaMismatch,
    TransportError,
    TransportTimeout,
    ViewsHeld,
    WouldBlock,
)

PATIENCE_S = 20.0
"""Longer than any machine needs; only a failing test waits for it."""


@dataclass
class Pair:
    """A client that sends OBSERVATION and a server that sends CHUNK."""

    client: Channel
    server: Channel


def same(got, expected) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    return got.keys() == expected.keys() and all(
        got[name].tobytes() == expected[name].tobytes() for name in expected
    )


def receive(channel: Channel, count: int) -> list[Message]:
    return [channel.recv(PATIENCE_S) for _ in range(count)]


def send_when_possible(channel: Channel, arrays, request_id: int) -> None:
    """Send once the peer's releases have arrived; over a network that takes a moment."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            channel.send(arrays, request_id)
            return
        except WouldBlock:
            if time.monotonic() >= until:
                raise AssertionError("the slots never came back") from None
        time.sleep(0)  # a reader in another thread needs the interpreter to release them


class ChannelContract:
    """``pair``: a fixture giving a fresh, connected ``Pair``."""

    def test_arrays_arrive_bit_for_bit_in_order(self, pair: Pair) -> None:
        for number in range(20):
            pair.client.send(observation(number), number, budget_ns=number * 1000)
            with pair.server.recv(PATIENCE_S) as message:
                assert message.kind is Kind.DATA
                assert (message.request_id, message.budget_ns) == (number, number * 1000)
                assert same(message.arrays, observation(number))
            pair.server.send(chunk(number), number)
            with pair.client.recv(PATIENCE_S) as message:
                assert message.request_id == number
                assert same(message.arrays, chunk(number))

    def test_arrays_are_aligned_and_read_only(self, pair: Pair) -> None:
        pair.client.send(observation(1), 1)
        with pair.server.recv(PATIENCE_S) as message:
            for array in message.arrays.values():
                assert array.flags.aligned
                with pytest.raises(ValueError, match="read-only"):
                    array[...] = 0

    def test_a_loan_is_written_in_place(self, pair: Pair) -> None:
        expected = observation(3)
        loan = pair.client.loan()
        for name, view in loan.arrays.items():
            view[...] = expected[name]
        loan.publish(3)
        with pair.server.recv(PATIENCE_S) as message:
            assert same(message.arrays, expected)
        with pytest.raises(ChannelClosed):
            _ = loan.arrays
        with pytest.raises(ChannelClosed):
            loan.publish(4)

    def test_a_cancelled_loan_sends_nothing(self, pair: Pair) -> None:
        loan = pair.client.loan()
        loan.cancel()
        loan.cancel()
        pair.client.send(observation(5), 5)
        with pair.server.recv(PATIENCE_S) as message:
            assert message.request_id == 5
        assert pair.server.poll() is None

    def test_an_announcement_promises_nothing(self, pair: Pair) -> None:
        loan = pair.client.loan()
        loan.announce()
        loan.announce()
        loan.cancel()
        loan.announce()
        assert pair.server.poll() is None
        loan = pair.client.loan()
        loan.announce()
        for name, array in observation(4).items():
            loan.arrays[name][...] = array
        loan.publish(4)
        loan.announce()
        with pair.server.recv(PATIENCE_S) as message:
            assert message.request_id == 4 and same(message.arrays, observation(4))
        assert pair.server.poll() is None

    def test_one_loan_at_a_time(self, pair: Pair) -> None:
        loan = pair.client.loan()
        with pytest.raises(TransportError, match="a loan is open"):
            pair.client.loan()
        with pytest.raises(TransportError, match="a loan is open"):
            pair.client.send_body(Kind.RESET, 1)
        loan.cancel()
        pair.client.send_body(Kind.RESET, 1)

    def test_every_slot_may_be_held_and_released_in_any_order(self, pair: Pair) -> None:
        for number in range(SLOTS):
            pair.client.send(observation(number), number)
        messages = receive(pair.server, SLOTS)
        for number in (2, 0, 3, 1):
            # What is still held stays as it was, whatever was released before.
            assert same(messages[number].arrays, observation(number))
            messages[number].release()
        for number in range(SLOTS):
            send_when_possible(pair.client, observation(10 + number), 10 + number)
        for number, message in enumerate(receive(pair.server, SLOTS)):
            assert same(message.arrays, observation(10 + number))
            message.release()

    def test_a_full_ring_would_block_and_says_so_in_its_counts(self, pair: Pair) -> None:
        for number in range(SLOTS):
            pair.client.send(observation(number), number)
        messages = receive(pair.server, SLOTS)
        with pytest.raises(WouldBlock):
            pair.client.send(observation(9), 9)
        with pytest.raises(WouldBlock):
            pair.client.send_body(Kind.RESET, 9)
        assert pair.client.statistics().would_block == 2
        assert pair.client.statistics().sent == SLOTS
        for message in messages:
            message.release()
        send_when_possible(pair.client, observation(9), 9)
        with pair.server.recv(PATIENCE_S) as message:
            assert message.request_id == 9

    def test_what_is_held_survives_further_traffic(self, pair: Pair) -> None:
        pair.client.send(observation(0), 0)
        first = pair.server.recv(PATIENCE_S)
        for number in range(1, SLOTS):
            pair.client.send(observation(number), number)
            pair.server.recv(PATIENCE_S).release()
        assert same(first.arrays, observation(0))

    def test_a_view_kept_after_release_stays_as_it_was(self, pair: Pair) -> None:
        """Whatever is kept: an array, a slice of one, the mapping. Only a copy frees the slot."""
        for keep in (
            lambda arrays: arrays,
            lambda arrays: arrays["image"],
            lambda arrays: arrays["image"][1:],
            lambda arrays: memoryview(arrays["image"])[1:],
        ):
            pair.client.send(observation(1), 1)
            message = pair.server.recv(PATIENCE_S)
            kept = keep(message.arrays)
            before = np.array(kept["image"] if isinstance(kept, Mapping) else kept)
            message.release()
            for number in range(2, SLOTS):
                pair.client.send(observation(number), number)
                with pair.server.recv(PATIENCE_S) as message:
                    assert message.request_id == number
            assert (np.array(kept["image"] if isinstance(kept, Mapping) else kept) == before).all()
            del kept
            for number in range(SLOTS):
                assert pair.server.poll() is None
                send_when_possible(pair.client, observation(number), number)
                pair.server.recv(PATIENCE_S).release()

    def test_a_reader_that_keeps_too_much_is_told(self, pair: Pair) -> None:
        kept = []
        with pytest.raises(ViewsHeld, match="still held 3 messages after its release"):
            for number in range(SLOTS):
                send_when_possible(pair.client, observation(number), number)
                with pair.server.recv(PATIENCE_S) as message:
                    kept.append(message.arrays["image"])
        for number, image in enumerate(kept):
            assert same({"image": image}, {"image": observation(number)["image"]})
        kept.clear()
        del image
        assert pair.server.poll() is None
        send_when_possible(pair.client, observation(9), 9)
        with pair.server.recv(PATIENCE_S) as message:
            assert message.request_id == 9

    def test_a_released_message_is_out_of_reach(self, pair: Pair) -> None:
        pair.client.send(observation(1), 1)
        message = pair.server.recv(PATIENCE_S)
        message.release()
        message.release()
        with pytest.raises(ChannelClosed):
            _ = message.arrays
        with pytest.raises(ChannelClosed):
            _ = message.body

    def test_bodies_of_every_kind(self, pair: Pair) -> None:
        for kind, body in ((Kind.ERROR, b"{}"), (Kind.SUPERSEDED, b"12"), (Kind.RESET, b"")):
            pair.server.send_body(kind, 7, body)
            with pair.client.recv(PATIENCE_S) as message:
                assert (message.kind, message.request_id, message.body) == (kind, 7, body)
                assert not message.arrays

    def test_a_long_body_is_cut(self, pair: Pair) -> None:
        pair.server.send_body(Kind.ERROR, 1, b"x" * (MAX_BODY_BYTES + 1))
        with pair.client.recv(PATIENCE_S) as message:
            assert message.body == b"x" * MAX_BODY_BYTES

    def test_data_is_not_a_body(self, pair: Pair) -> None:
        with pytest.raises(TransportError, match="send_body: got DATA"):
            pair.client.send_body(Kind.DATA, 1, b"")

    def test_kinds_keep_their_order_among_each_other(self, pair: Pair) -> None:
        pair.client.send(observation(1), 1)
        pair.client.send_body(Kind.RESET, 2)
        pair.client.send(observation(3), 3)
        kinds = []
        for message in receive(pair.server, 3):
            kinds.append((message.kind, message.request_id))
            message.release()
        assert kinds == [(Kind.DATA, 1), (Kind.RESET, 2), (Kind.DATA, 3)]

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"state": np.zeros(13, np.float32)}, r"state: got float32 \(13,\), expected"),
            ({"state": np.zeros(14, np.float64)}, r"state: got float64 \(14,\), expected"),
            ({"depth": np.zeros(1, np.uint8)}, r"depth: got an array, expected only"),
        ],
    )
    def test_other_arrays_are_refused_and_nothing_is_sent(self, pair: Pair, change, text) -> None:
        with pytest.raises(SchemaMismatch, match=text):
            pair.client.send({**observation(1), **change}, 1)
        without = observation(1)
        del without["image"]
        with pytest.raises(SchemaMismatch, match="image: got nothing"):
            pair.client.send(without, 1)
        pair.client.send(observation(2), 2)
        with pair.server.recv(PATIENCE_S) as message:
            assert message.request_id == 2

    @pytest.mark.parametrize("request_id", [-1, 2**63])
    def test_a_request_id_out_of_range_is_refused(self, pair: Pair, request_id: int) -> None:
        with pytest.raises(TransportError, match="request_id"):
            pair.client.send(observation(1), request_id)

    def test_the_largest_request_id_arrives(self, pair: Pair) -> None:
        pair.client.send(observation(1), 2**63 - 1)
        with pair.server.recv(PATIENCE_S) as message:
            assert message.request_id == 2**63 - 1

    def test_a_budget_that_is_used_up_is_not_unlimited(self, pair: Pair) -> None:
        pair.client.send(observation(1), 1, budget_ns=-5)
        with pair.server.recv(PATIENCE_S) as message:
            assert message.budget_ns == 1

    def test_nothing_to_read(self, pair: Pair) -> None:
        assert pair.server.poll() is None
        with pytest.raises(TransportTimeout):
            pair.server.recv(0.0)
        with pytest.raises(TransportTimeout, match=r"0\.01 s"):
            pair.client.recv(0.01)

    def test_a_waiting_reader_wakes_up(self, pair: Pair) -> None:
        got: list[int] = []

        def read() -> None:
            for _ in range(50):
                with pair.server.recv(PATIENCE_S) as message:
                    got.append(message.request_id)

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(50):
            send_when_possible(pair.client, observation(number), number)
        reader.join(PATIENCE_S)
        assert got == list(range(50))

    def test_what_was_sent_before_a_close_can_still_be_read(self, pair: Pair) -> None:
        pair.server.send(chunk(1), 1)
        pair.server.send(chunk(2), 2)
        pair.server.close("the lab is closing")
        for number in (1, 2):
            with pair.client.recv(PATIENCE_S) as message:
                assert same(message.arrays, chunk(number))
        with pytest.raises(PeerGone, match="the lab is closing"):
            pair.client.recv(PATIENCE_S)
        with pytest.raises(PeerGone, match="the lab is closing"):
            pair.client.poll()

    def test_the_server_learns_that_the_client_closed(self, pair: Pair) -> None:
        pair.client.close("done")
        with pytest.raises(PeerGone, match="done"):
            pair.server.recv(PATIENCE_S)
        with pytest.raises(PeerGone, match="done"):
            pair.server.send(chunk(1), 1)
        with pytest.raises(PeerGone):
            pair.server.loan()

    def test_a_closed_channel_says_so(self, pair: Pair) -> None:
        pair.client.send(observation(1), 1)
        held = pair.server.recv(PATIENCE_S)
        arrays = held.arrays
        for channel in (pair.client, pair.server):
            channel.close()
            channel.close("again")
            for call in (channel.poll, channel.loan, lambda c=channel: c.recv(1.0)):
                with pytest.raises(ChannelClosed):
                    call()
        # A slow reader must not crash on what its peer, or its own side, gave up meanwhile.
        assert same(arrays, observation(1))
        held.release()

    def test_an_open_loan_does_not_outlive_its_channel(self, pair: Pair) -> None:
        loan = pair.client.loan()
        pair.client.close()
        with pytest.raises(ChannelClosed):
            loan.publish(1)

    def test_counts(self, pair: Pair) -> None:
        for number in range(3):
            pair.client.send(observation(number), number)
            pair.server.recv(PATIENCE_S).release()
        assert pair.client.statistics().sent == 3
        assert pair.server.statistics().received == 3
        assert pair.server.statistics().dropped_malformed == 0
        assert pair.server.statistics().dropped_epoch == 0

    def test_it_is_a_context_manager_and_names_itself(self, pair: Pair) -> None:
        assert pair.client.transport == pair.server.transport
        assert pair.client.send_schema == pair.server.recv_schema == OBSERVATION
        with pair.client as channel:
            assert channel is pair.client
        with pytest.raises(ChannelClosed):
            pair.client.poll()
