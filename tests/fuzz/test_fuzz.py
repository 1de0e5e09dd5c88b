"""The fuzzers' targets, briefly: their seeds and some seeded mutations of them, in plain Python.

``make fuzz`` runs the same targets for as long as it is told, guided by coverage.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import corpus
from tests.fuzz.feed import Feed, reached
from tests.fuzz.mutation import Violation, hammer
from tests.fuzz.targets import TARGETS, open_target

RUNS = 600
GATES = {
    "control": ("prefix", "body"),
    "hello": ("accepted",),
    "segment_offer": ("accepted",),
    "schema": ("accepted", "of varying length"),
    "description": ("accepted",),
    "error": ("ContractMismatch", "InferenceError"),
    "chunk": ("accepted",),
    "demand": ("read", "admitted"),
    "trace_key": ("keys",),
    "pictures": ("readers", "pixels", "jpegs"),
    "jpeg": ("given to the decoder", "decoded"),
    "openpi_frame": ("maps", "arrays", "observations"),
    "session": ("DATA", "RESET"),
    "segments": ("DATA", "ERROR", "RESET"),
    "handshake": ("proven", "sessions over shm", "sessions over zmq"),
    "listener": ("sessions", "DATA"),
    "shm_acceptor": ("accepted",),
    "authenticator": ("admitted",),
    "dialer": ("described", "opened", "chunks"),
    "client_handshake": ("mapped",),
    "ilstudio": ("refused", "accepted", "observations"),
    "lerobot_pickle": ("observations", "instructions"),
    "lerobot_parts": ("joined",),
    "groot_npy": ("accepted",),
    "groot_request": ("unpacked", "nested", "flat"),
    "groot_zmtp": ("handshakes", "requests", "too long", "heartbeats"),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Disable logging: thousands of refusals would be logged."""
    logging.disable(logging.CRITICAL)
    reached.clear()
    yield
    logging.disable(logging.NOTSET)


def test_every_target_lists_its_gates() -> None:
    assert set(GATES) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_guarantee(name: str) -> None:
    with open_target(name) as target:
        hammer(target, corpus.seeds(name), RUNS, seed=1)
    missed = [gate for gate in GATES[name] if not reached[gate]]
    assert not missed, f"{name} never got past {missed}: {dict(reached)}"


@pytest.mark.parametrize("name", TARGETS)
def test_committed_seeds_match_the_generator(name: str) -> None:
    files = sorted((corpus.FOLDER / name).iterdir())
    assert [file.read_bytes() for file in files] == corpus.seeds(name), (
        "python -m tests.fuzz.corpus"
    )


def test_the_seeds_are_few() -> None:
    assert sum(f.stat().st_size for f in corpus.FOLDER.rglob("*") if f.is_file()) < 200_000


def test_a_broken_parser_is_found() -> None:
    with open_target("broken") as broken:
        broken(bytes(8))
        with pytest.raises(Violation, match="IndexError") as caught:
            hammer(broken, corpus.seeds("broken"), 2000, seed=1)
        with pytest.raises(IndexError):
            broken(caught.value.data)


GREEDY = """
from tests.fuzz.targets import MAX_GROWTH_KB, bounded

held = []
target = bounded(lambda data: held.append(bytearray(b"x") * (len(data) * MAX_GROWTH_KB * 1024)))
target(b"")
target(b"xx")
"""


def test_excessive_memory_is_found() -> None:
    """In a new process: in this one other tests may have needed more before, and peaks are kept.

    A shell's child: what is started from here directly keeps this process's peak for its own.
    """
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, GREEDY],
        cwd=corpus.FOLDER.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and "one input took" in done.stderr, done.stderr


def test_the_same_seed_gives_the_same_inputs() -> None:
    runs: list[list[bytes]] = [[], []]
    for seen in runs:
        hammer(seen.append, [b"seed", b"another"], 50, seed=3)
    assert runs[0] == runs[1] and len(set(runs[0])) > 40


def test_input_of_zeros_is_the_valid_message() -> None:
    valid = {"a": [1, "two", None], "b": {"c": 1.5}}
    feed = Feed(b"")
    assert feed.vary(valid) is valid and feed.bytes_near(b"same") == b"same"
    assert json.loads(feed.json(valid)) == valid


def test_libfuzzer_finds_the_violation_and_keeps_the_input(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    results, crashes = tmp_path / "fuzz.json", tmp_path / "crashes"
    command = [sys.executable, "-m", "tests.fuzz", "broken", "--results", str(results)]
    done = subprocess.run(
        [*command, "--crashes", str(crashes)],
        cwd=corpus.FOLDER.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    (outcome,) = json.loads(results.read_text())["targets"]
    (kept,) = outcome["crashes"]
    assert done.returncode == 1, done.stdout + done.stderr
    assert Path(kept).parent == crashes / "broken" and kept in done.stdout
    with open_target("broken") as broken, pytest.raises(IndexError):
        broken(Path(kept).read_bytes())
