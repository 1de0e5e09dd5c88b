"""Messages of a live view: dropped and counted where a viewer is slow, kept where a file is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import pytest

from runtime.eval_real.live_rollout import LiveRollout
from runtime.eval_real.run_config import RunConfig
from runtime.eval_sim import cli as eval_sim
from runtime.live_view import live_view_writer, options
from runtime.live_view.layout import (
    CHUNKS,
    PICTURES,
    TEXTS,
    TICKS,
    LiveViewLayout,
    LiveViewSegment,
    create_segment,
)
from runtime.live_view.live_view_writer import MOST_PICTURES, LiveViewWriter
from runtime.live_view.options import LiveViewOptions
from tests.datasets.test_dataset_eval_real import CONTRACT
from tests.runtime.command import status_of

LAYOUT = LiveViewLayout(
    title="test", state_names=("a", "b"), action_names=("a", "b"), cameras={"top": (4, 6)},
    chunk_size=20, step_s=0.02, origin_ns=0, keeps_all=False,
)  # fmt: skip
COMMAND = np.zeros(2, np.float32)


class Memory:
    """The segment, and both of its ends."""

    def __init__(self, layout: LiveViewLayout) -> None:
        self.fd = create_segment(layout)
        self.writer = LiveViewWriter(self.fd, layout)
        self.segment = LiveViewSegment(self.fd, layout)
        self.readers = self.segment.readers()

    def take(self, queue: str, *names: str) -> list[tuple]:
        """What is in a queue; values by name."""
        found = []
        while (views := self.readers[queue].peek()) is not None:
            found.append(tuple(views[name].tolist() for name in names))
            self.readers[queue].release()
        return found

    def close(self) -> None:
        self.writer.close()
        self.readers.clear()
        self.segment.close()
        os.close(self.fd)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    made = Memory(dataclasses.replace(LAYOUT, keeps_all=getattr(request, "param", False)))
    yield made
    made.close()


def ticks(memory: Memory, count: int) -> None:
    for number in range(count):
        memory.writer.tick(number, COMMAND, attempt=1, source=0)


def test_where_nobody_reads_messages_are_dropped_and_counted(memory: Memory) -> None:
    ticks(memory, 5000)
    picture = np.zeros((4, 6, 3), np.uint8)
    for time_ns in range(PICTURES + 3):
        memory.writer.picture("top", time_ns, picture)
    dropped = {"ticks": 5000 - 4096, "camera top": 3}
    assert memory.writer.dropped() == {"states": 0, "chunks": 0, "texts": 0} | dropped
    assert memory.segment.dropped["camera top"].load() == 3
    assert memory.take(TICKS, "number") == [(number,) for number in range(4096)]
    ticks(memory, 1)
    assert memory.take(TICKS, "number") == [(5000,)]


@pytest.mark.parametrize("memory", [True], indirect=True)
def test_for_a_file_every_tick_waits_for_room(memory: Memory) -> None:
    ticks(memory, 10_000)
    found = memory.take(TICKS, "time_ns", "number")
    while not memory.writer.flush(0.0, lambda: True):
        found += memory.take(TICKS, "time_ns", "number")
    found += memory.take(TICKS, "time_ns", "number")
    assert found == [(number, number) for number in range(10_000)]
    assert not any(memory.writer.dropped().values())


@pytest.mark.parametrize("memory", [True], indirect=True)
def test_pictures_for_a_file_wait_in_bounded_memory(memory: Memory) -> None:
    for time_ns in range(PICTURES + MOST_PICTURES + 2):
        memory.writer.picture("top", time_ns, np.full((2, 3, 3), time_ns, np.uint8))
    assert memory.writer.dropped()["camera top"] == 2
    found = memory.take("camera top", "time_ns", "height", "width", "pixels")
    assert [row[:3] for row in found] == [(time_ns, 2, 3) for time_ns in range(PICTURES)]
    assert [row[3][:18] for row in found] == [[time_ns] * 18 for time_ns in range(PICTURES)]


@pytest.mark.parametrize("memory", [True], indirect=True)
def test_nothing_is_waited_for_when_nobody_is_there(memory: Memory) -> None:
    ticks(memory, 5000)
    assert not memory.writer.flush(60.0, lambda: False)
    memory.writer.give_up()
    assert memory.writer.flush(0.0, lambda: False)


def test_a_picture_that_does_not_fit_is_an_error(memory: Memory) -> None:
    with pytest.raises(ValueError, match=r"'top': got 5 x 6, expected at most \(4, 6\)"):
        memory.writer.picture("top", 0, np.zeros((5, 6, 3), np.uint8))


def test_a_long_text_is_cut(memory: Memory) -> None:
    memory.writer.text(7, "ä" * 200)
    ((time_ns, text),) = memory.take(TEXTS, "time_ns", "text")
    assert (time_ns, bytes(text)) == (7, "ä".encode() * 120)
    assert live_view_writer.TEXT_BYTES == 240


def test_a_plan_is_shown_when_its_actions_are_due(memory: Memory) -> None:
    """Policy ticks of 20 ms, control ticks of 10 ms; the first chunk comes before the motion."""
    config = RunConfig(
        robot="toy", contract_json=CONTRACT.to_json(), address="127.0.0.1:1", publish_rate=100.0
    )
    rollout = LiveRollout(memory.writer, config)
    ms = 1_000_000

    def row(tick: int, due_ms: int, played: bool, attempt: int = 2) -> None:
        values = {
            "sent_ns": (due_ms + 1) * ms, "captured_ns": 0, "deadline_ns": due_ms * ms,
            "attempt": attempt, "source": -1, "played": played, "tick": tick,
        }  # fmt: skip
        arrays = {name: np.array(value, np.int64) for name, value in values.items()}
        rollout.row(arrays | {"command": COMMAND, "state": COMMAND})

    def chunk(obs_timestep: int, attempt: int) -> None:
        numbers = {
            "attempt": attempt, "arrived_ns": 5, "obs_timestep": obs_timestep,
            "first_action_offset": 1, "count": 3,
        }  # fmt: skip
        rollout.chunk({name: np.array(value, np.int64) for name, value in numbers.items()} | {
            "actions": np.ones((20, 2), np.float32), "stages_ns": np.arange(8),
        })  # fmt: skip

    chunk(0, attempt=1)
    chunk(0, attempt=2)
    row(0, 1000, played=False)
    assert memory.take(CHUNKS, "first_ns") == []
    row(0, 1010, played=True)
    chunk(2, attempt=2)
    chunk(0, attempt=3)
    row(1, 1020, played=True)
    assert memory.take(CHUNKS, "first_ns", "count") == [(1030 * ms, 3), (1070 * ms, 3)]
    row(0, 5000, played=True, attempt=3)
    assert memory.take(CHUNKS, "first_ns", "time_ns") == [(5020 * ms, 5)]
    lateness = memory.take(TICKS, "lateness_s", "attempt")
    assert lateness == [(0.001, 2)] * 3 + [(0.001, 3)]


@pytest.mark.parametrize("target", [None, "viewer", "a/b.rrd", "rerun+http://desk:9876/proxy"])
def test_a_view_has_a_viewer_or_a_file(target: str | None) -> None:
    assert (LiveViewOptions(rerun=target).file is not None) == (target == "a/b.rrd")


def test_another_target_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--rerun: got 'a\.mp4', expected no value, FILE\.rrd or"):
        LiveViewOptions(rerun="a.mp4")


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    policy = "python:tests.datasets.two_camera_policy:make"
    assert status_of(eval_sim.main, ["-m", policy, "-e", "fake", *flags]) == eval_sim.BAD_INPUT
    return capsys.readouterr().err


def test_an_absent_package_is_one_line_before_anything_starts(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "EXTRA", ("no_such_rerun",))
    said = refused(capsys, "--rerun", str(tmp_path / "a.rrd"), "-o", str(tmp_path / "out"))
    expected = "got no module 'no_such_rerun', expected it: pip install '.[rerun]'"
    assert said == f"error: --rerun: {expected}\n"
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_is_refused(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "EXTRA", ())
    (tmp_path / "file").touch()
    said = refused(capsys, "--rerun", str(tmp_path / "file" / "a.rrd"), "-o", str(tmp_path))
    assert "cannot be written" in said and len(said.splitlines()) == 1


def test_several_worlds_are_not_shown_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rerun with --num_envs > 1" in refused(capsys, "--rerun", "--num_envs", "2")
