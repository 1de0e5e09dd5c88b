"""CURVE: which keys are admitted, how soon others are refused, and no effect on other sessions."""

from __future__ import annotations

import logging
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import zmq
from contracts.channel import PATIENCE_S
from contracts.frames import OBSERVATION
from contracts.robot import until
from transport_rig import make_listener, pumped

from runtime.tools.keys import allow, main, new_keys
from transport.dialer import Dialer
from transport.errors import Refused, TransportTimeout, WouldBlock
from transport.zeromq import zmtp_greeting
from transport.zeromq.client_socket import ClientSocket
from transport.zeromq.curve import ClientKeys, KeyFileError, ServerKeys, public_key

REFUSED_WITHIN_S = 1.0


class Keyring:
    """A server's keys and list, and what its clients have of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.listed = folder, folder / "allowed"
        self.server_public, self.server_secret = new_keys(folder, "server")
        self.listed.mkdir()

    def server(self) -> ServerKeys:
        return ServerKeys.load(self.server_secret, self.listed)

    def client(self, name: str, *, listed: bool = True, operator: bool = False) -> ClientKeys:
        public, secret = new_keys(self.folder, name)
        if listed:
            allow(public, self.listed, operator=operator)
        return ClientKeys.load(self.server_public, secret)


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys")


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_listed_key_is_admitted_and_known_by_name(ring: Keyring, transport: str) -> None:
    with (
        make_listener(curve=ring.server()) as listener,
        Dialer("127.0.0.1", listener.port, timeout_s=5, curve=ring.client("arm-3")) as dialer,
        pumped(listener),
    ):
        channel, _ = dialer.open(OBSERVATION, client="c", transport=transport)
        with channel:
            until = time.monotonic() + PATIENCE_S
            while not listener.sessions and time.monotonic() < until:
                time.sleep(0)  # over ZMQ the client is done first
            (session,) = listener.sessions.values()
            assert session.peer.user == "arm-3"
            assert str(session.peer) == "arm-3 at 127.0.0.1"


def _no_keys(ring: Keyring) -> ClientKeys | None:
    return None


def _unlisted(ring: Keyring) -> ClientKeys | None:
    return ring.client("stranger", listed=False)


def _other_server(ring: Keyring) -> ClientKeys | None:
    mine = ring.client("misled")
    other, _ = new_keys(ring.folder, "another_server")
    return ClientKeys(public_key(other), mine.public, mine.secret)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (_no_keys, "none"),
        (_unlisted, "not on its list"),
        (_other_server, "another server's key"),
    ],
)
def test_other_keys_are_refused_at_once_and_logged_and_sessions_continue(
    ring: Keyring, caplog: pytest.LogCaptureFixture, keys, says: str
) -> None:
    caplog.set_level(logging.WARNING)
    with (
        make_listener(curve=ring.server()) as listener,
        Dialer("127.0.0.1", listener.port, timeout_s=5, curve=ring.client("good")) as good,
        pumped(listener),
    ):
        channel, _ = good.open(OBSERVATION, client="good", transport="zmq")
        with channel, Dialer("127.0.0.1", listener.port, timeout_s=5, curve=keys(ring)) as bad:
            began = time.monotonic()
            with pytest.raises(Refused, match=says):
                bad.describe()
            assert time.monotonic() - began < REFUSED_WITHIN_S
            until(lambda: set(listener.sessions) == {1})  # the refusal may come first
            with Dialer("127.0.0.1", listener.port, timeout_s=5, curve=ring.client("late")) as late:
                assert late.describe() == {"serves": "tests"}
        assert any("refused a connection" in text for text in caplog.messages)


def test_a_refusal_before_the_request_is_sent_is_told(
    ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere_to_send(*_: object) -> None:
        raise WouldBlock("the connection has ended")

    monkeypatch.setattr(ClientSocket, "send_control", nowhere_to_send)
    with (
        make_listener(curve=ring.server()) as listener,
        Dialer("127.0.0.1", listener.port, timeout_s=5, curve=_unlisted(ring)) as dialer,
        pumped(listener),
        pytest.raises(Refused, match="not on its list"),
    ):
        dialer.describe()


def test_keys_for_a_server_that_has_none_are_refused_at_once(ring: Keyring) -> None:
    with (
        make_listener() as listener,
        Dialer("127.0.0.1", listener.port, timeout_s=5, curve=ring.client("arm")) as dialer,
        pumped(listener),
    ):
        began = time.monotonic()
        with pytest.raises(Refused, match="has none itself"):
            dialer.describe()
        assert time.monotonic() - began < REFUSED_WITHIN_S


def test_key_removed_from_the_list_is_refused(ring: Keyring) -> None:
    keys = ring.client("arm")
    with make_listener(curve=ring.server()) as listener, pumped(listener):
        with Dialer("127.0.0.1", listener.port, timeout_s=5, curve=keys) as dialer:
            dialer.describe()
        (ring.listed / "arm.key").unlink()
        with (
            Dialer("127.0.0.1", listener.port, timeout_s=5, curve=keys) as dialer,
            pytest.raises(Refused, match="not on its list"),
        ):
            dialer.describe()


def test_what_crosses_cannot_be_read(ring: Keyring) -> None:
    """A relay in the middle sees neither the greeting's JSON nor a description."""
    seen = bytearray()
    with (
        make_listener(curve=ring.server()) as listener,
        pumped(listener),
        socket.create_server(("127.0.0.1", 0)) as middle,
    ):
        middle.settimeout(PATIENCE_S)

        def one_way(source: socket.socket, sink: socket.socket) -> None:
            while data := source.recv(65536):
                seen.extend(data)
                sink.sendall(data)

        def carry() -> None:
            here, _ = middle.accept()
            there = socket.create_connection(("127.0.0.1", listener.port))
            back = threading.Thread(target=one_way, args=(there, here))
            back.start()
            one_way(here, there)
            there.shutdown(socket.SHUT_RDWR)
            back.join()
            here.close()
            there.close()

        relay = threading.Thread(target=carry)
        relay.start()
        port = middle.getsockname()[1]
        with Dialer("127.0.0.1", port, timeout_s=5, curve=ring.client("arm")) as dialer:
            assert dialer.describe() == {"serves": "tests"}
        relay.join(PATIENCE_S)
    assert b"CURVE" in seen
    assert b"serves" not in seen


def test_admin_command_is_passed_with_its_sender(ring: Keyring) -> None:
    def ask(command, arguments, peer):
        if command != "who":
            raise Refused("command", command, "who")
        return {"user": peer.user, "said": arguments}

    with make_listener(curve=ring.server(), admin_handler=ask) as listener, pumped(listener):
        keys = ring.client("boss", operator=True)
        with Dialer("127.0.0.1", listener.port, timeout_s=5, curve=keys) as dialer:
            assert dialer.send_admin_command("who", {"a": 1}) == {
                "user": "operators/boss",
                "said": {"a": 1},
            }
            with pytest.raises(Refused, match="what"):
                dialer.send_admin_command("what")
            assert dialer.describe() == {"serves": "tests"}


def test_garbage_at_an_encrypted_port_does_not_affect_sessions(ring: Keyring) -> None:
    with make_listener(curve=ring.server()) as listener, pumped(listener):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", listener.port)) as raw:
                raw.sendall(
                    b"\xff" + bytes(8) + b"\x7f\x03" + b"CURVE".ljust(20, b"\0") + b"x" * 999
                )
        with Dialer("127.0.0.1", listener.port, timeout_s=5, curve=ring.client("arm")) as dialer:
            assert dialer.describe() == {"serves": "tests"}


@pytest.mark.parametrize("what", ["absent", "no key", "short", "public for secret", "readable"])
def test_a_key_file_that_cannot_be_used_is_named(ring: Keyring, what: str) -> None:
    keys = ring.client("arm")
    path = ring.folder / "arm.key_secret"
    if what == "absent":
        path.unlink()
    elif what == "no key":
        path.write_text("nothing\n")
    elif what == "short":
        path.write_text(path.read_text().replace(keys.secret.decode(), "abcde"))
    elif what == "public for secret":
        path = ring.folder / "arm.key"
    else:
        path.chmod(0o644)
    with pytest.raises(KeyFileError, match=str(path)):
        ClientKeys.load(ring.server_public, path)


def test_bad_file_in_the_list_is_ignored(ring: Keyring) -> None:
    (ring.listed / "aaa.key").write_text("nothing\n")
    (ring.listed / "bbb.key").write_bytes(b"\xff\xfe\x00")
    text = (ring.folder / "server.key").read_text()
    key = ring.server().public.decode()
    for number, bad in enumerate(("~" * 40, "#" * 40, '"' * 5, "0" * 39)):
        (ring.listed / f"c{number}.key").write_text(text.replace(key, bad))
    ring.client("arm")
    known = zmq.auth.load_certificate(ring.folder / "arm.key")[0]
    assert ring.server().find_name(known) == "arm"


def test_the_list_must_be_there(ring: Keyring) -> None:
    shutil.rmtree(ring.listed)
    with pytest.raises(KeyFileError, match="expected one with clients' public keys"):
        ring.server()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, listed = str(tmp_path / "keys"), str(tmp_path / "list")
    assert main(["new", keys, "arm"]) == 0
    secret = tmp_path / "keys" / "arm.key_secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert main(["allow", f"{keys}/arm.key", listed, "--operator"]) == 0
    assert main(["show", f"{keys}/arm.key"]) == 0
    assert len(capsys.readouterr().out.splitlines()[-1]) == 40
    assert (tmp_path / "list" / "operators" / "arm.key").exists()
    for bad, says in (
        (["new", keys, "arm"], "got a file that exists"),
        (["new", keys, "../arm"], "expected letters"),
        (["allow", str(secret), listed], "expected the public one"),
        (["allow", f"{keys}/none.key", listed], "expected a key file"),
    ):
        assert main(bad) == 2
        assert says in capsys.readouterr().err


def test_no_answer_is_not_reported_as_a_refusal(ring: Keyring) -> None:
    """Without a server there is no refusal, with or without keys."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with (
            Dialer("127.0.0.1", port, timeout_s=0.2, curve=ring.client("arm")) as dialer,
            pytest.raises(TransportTimeout, match="nothing answered"),
        ):
            dialer.describe()


def test_mechanism_is_read_from_a_server_that_hangs_up_first(ring: Keyring) -> None:
    """Which of two ends with different security hangs up first is chance; the reason is not."""
    for curve, wanted in ((None, "NULL"), (ring.server(), "CURVE")):
        with make_listener(curve=curve) as listener, pumped(listener):
            assert zmtp_greeting.read_mechanism(f"tcp://127.0.0.1:{listener.port}") == wanted


def test_what_is_not_zmq_has_no_greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp_greeting, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert (
            zmtp_greeting.read_mechanism(f"tcp://127.0.0.1:{port}") == ""
        )  # connected, and silence
    assert zmtp_greeting.read_mechanism(f"tcp://127.0.0.1:{port}") == ""


def test_a_file_of_the_list_is_parsed_once_for_each_state(
    ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring.client("arm")
    keys, parsed = ring.server(), []
    known = zmq.auth.load_certificate(ring.folder / "arm.key")[0]

    def counted(path: str) -> bytes:
        parsed.append(path)
        return public_key(path)

    monkeypatch.setattr("transport.zeromq.curve.public_key", counted)
    assert [keys.find_name(known) for _ in range(3)] == ["arm"] * 3
    assert len(parsed) == 1
    other, _ = new_keys(ring.folder, "other")
    entry = ring.listed / "arm.key"
    entry.write_bytes(other.read_bytes())
    assert keys.find_name(known) is None
    entry.unlink()
    assert keys.find_name(zmq.auth.load_certificate(other)[0]) is None


def test_error_while_checking_a_key_refuses_it_and_server_continues(
    ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = ring.client("arm")
    with make_listener(curve=ring.server()) as listener, pumped(listener):
        with monkeypatch.context() as patched:
            patched.setattr(ServerKeys, "find_name", lambda *_: 1 / 0)
            with (
                pytest.raises((Refused, TransportTimeout)),
                Dialer("127.0.0.1", listener.port, timeout_s=0.5, curve=allowed) as dialer,
            ):
                dialer.describe()
        with Dialer("127.0.0.1", listener.port, timeout_s=5, curve=allowed) as dialer:
            assert dialer.describe() == {"serves": "tests"}
