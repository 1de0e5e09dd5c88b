"""Checksummed frames between two processes, with random work and random holding on both sides."""

from __future__ import annotations

import logging

import pytest
from transport_forks import LONG, Nursery

FRAMES = 1_000_000 if LONG else 20_000
_log = logging.getLogger(__name__)
pytestmark = pytest.mark.timeout(1800 if LONG else 120)


@pytest.mark.parametrize("upstream", [True, False], ids=["to-the-server", "to-the-client"])
def test_no_frame_is_torn_reordered_or_lost_uncounted(nursery: Nursery, upstream: bool) -> None:
    """Frames that found no place were passed over by their sender, which counts them."""
    sends, receives = "transport_streams:send_frames", "transport_streams:receive_frames"
    sending = {"count": FRAMES, "seed": 3}
    dialed, dialing = (receives, sends) if upstream else (sends, receives)
    more = {sends: sending, receives: {"seed": 4}}
    with nursery.fork(dialed, port=0, **more[dialed]) as server:
        port = server.expect("listening")["port"]
        with nursery.fork(dialing, port=port, **more[dialing]) as client:
            sender, receiver = (client, server) if upstream else (server, client)
            sent = sender.expect("done", 1800)
            sender.tell("close")
            sender.finish()
            got = receiver.expect("done", 60)
    assert sent["sent"] + sent["lost"] == FRAMES
    assert (got["torn"], got["reordered"], got["dropped"], got["timeouts"]) == (0, 0, 0, 0)
    assert got["got"] == sent["sent"]
    assert got["missing"] + FRAMES - 1 - got["last"] == sent["lost"]
    assert got["most"] == 3, "three were never held at once"
    _log.info("%s %s", sent, got)
