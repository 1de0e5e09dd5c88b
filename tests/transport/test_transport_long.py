"""Checksummed frames between two processes, with random work and random holding on both sides."""

from __future__ import annotations

import logging

import pytest
from transport_forks import LONG, ForkServer

FRAMES = 1_000_000 if LONG else 20_000
_log = logging.getLogger(__name__)
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800 if LONG else 120)]


@pytest.mark.parametrize("upstream", [True, False], ids=["to-the-server", "to-the-client"])
def test_no_frame_is_torn_reordered_or_lost_uncounted(
    fork_server: ForkServer, upstream: bool
) -> None:
    """The sender counts frames that found no place."""
    sends, receives = "transport_streams:send_frames", "transport_streams:receive_frames"
    sending = {"count": FRAMES, "seed": 3}
    dialed, dialing = (receives, sends) if upstream else (sends, receives)
    more = {sends: sending, receives: {"seed": 4}}
    with fork_server.fork(dialed, port=0, **more[dialed]) as server:
        port = server.expect("listening")["port"]
        with fork_server.fork(dialing, port=port, **more[dialing]) as client:
            sender, receiver = (client, server) if upstream else (server, client)
            sent = sender.expect("done", 1800)
            sender.send_line("close")
            sender.finish()
            got = receiver.expect("done", 60)
    assert sent["sent"] + sent["lost"] == FRAMES
    assert (got["torn"], got["reordered"], got["dropped"], got["timeouts"]) == (0, 0, 0, 0)
    assert got["got"] == sent["sent"]
    assert got["missing"] + FRAMES - 1 - got["last"] == sent["lost"]
    assert got["max_held"] == 3, "three were never held at once"
    _log.info("%s %s", sent, got)
