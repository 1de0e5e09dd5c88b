"""Logs the messages of a live view with Rerun: entities, and how the viewer arranges them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from policies import jpeg
from policies.types import STAGES
from runtime.live_view.errors import LiveViewError
from runtime.live_view.layout import LiveViewLayout
from runtime.live_view.options import FILE_SUFFIX, VIEWER

APPLICATION, TIMELINE = "metronome", "time"
COMMANDED, PLANNED, MEASURED = "commanded", "planned", "measured"
LATENESS, AGE, SEAM = "timing/lateness_ms", "timing/action_age_ms", "timing/seam_jump"
TEXTS = "log"
VIEWER_URL = "rerun+http://127.0.0.1:9876/proxy"
OPENS_WITHIN_S, OPENING_S, CONNECTS_WITHIN_S = 15.0, 0.2, 2.0
QUALITY = 85
COLORS = {MEASURED: (120, 120, 120), COMMANDED: (30, 120, 220), PLANNED: (240, 150, 40)}
Columns = Mapping[str, NDArray[Any]]


class RerunLog:
    """One recording of Rerun, in a viewer or in a file.

    Args:
        target: ``VIEWER``, a viewer's URL or a file's path.
        layout: The evaluation's.

    Raises:
        LiveViewError: There is no viewer there, or it does not open.
        OSError: The file cannot be written.
    """

    def __init__(self, target: str, layout: LiveViewLayout) -> None:
        import rerun

        self._rerun, self._layout = rerun, layout
        self._last: tuple[int, int, int, NDArray[np.float32]] | None = None
        self.recording = rerun.RecordingStream(APPLICATION)
        self._file: BinaryIO | None = None
        if target.endswith(FILE_SUFFIX):
            # Written here: Rerun's own writer says nothing of a full disk.
            self._stream = self.recording.binary_stream()
            self._file = Path(target).open("wb")  # noqa: SIM115 (until ``close``)
        else:
            self._connect(target)
        blueprint = self._blueprint()
        self.recording.send_blueprint(blueprint, make_active=False, make_default=True)
        self.recording.send_recording_name(layout.title)
        self._describe()

    def _connect(self, target: str) -> None:
        if target == VIEWER:
            target = VIEWER_URL
            if not _listens(target, CONNECTS_WITHIN_S):
                _open_viewer()
        elif not _listens(target, CONNECTS_WITHIN_S):
            raise LiveViewError(f"--rerun: got nothing at {target}, expected a viewer")
        self.recording.connect_grpc(target)

    def _joint(self, name: str) -> str:
        return str(self._rerun.new_entity_path(["joints", name]))

    def _measured(self) -> list[str]:
        """The entity of each measured joint: beside its command where they are as many."""
        layout = self._layout
        if len(layout.state_names) == len(layout.action_names):
            return [f"{self._joint(name)}/{MEASURED}" for name in layout.action_names]
        path = self._rerun.new_entity_path
        return [f"{path(['state', name])}/{MEASURED}" for name in layout.state_names]

    def _camera(self, name: str) -> str:
        return str(self._rerun.new_entity_path(["cameras", name]))

    def _blueprint(self) -> Any:
        from rerun import blueprint as rrb

        layout = self._layout
        cameras = [
            rrb.Spatial2DView(origin=self._camera(name), name=name) for name in layout.cameras
        ]
        joints = [
            rrb.TimeSeriesView(
                origin=self._joint(name), name=name, plot_legend=rrb.PlotLegend(visible=False)
            )
            for name in layout.action_names
        ]
        timing = [
            rrb.TimeSeriesView(origin=origin, name=name)
            for origin, name in (
                (LATENESS, "lateness (ms)"),
                (AGE, "action age (ms)"),
                ("timing/stages", "stages (ms)"),
                (SEAM, "seams"),
            )
        ]
        texts = rrb.TextLogView(origin=TEXTS, name="phases and stops")
        return rrb.Blueprint(
            rrb.Horizontal(
                rrb.Vertical(*cameras, texts),
                rrb.Grid(*joints),
                rrb.Vertical(*timing),
                column_shares=[3, 5, 2],
            ),
            collapse_panels=True,
        )

    def _describe(self) -> None:
        """Log how the series are drawn: a plan as dots, because plans of two chunks overlap."""
        rerun, log = self._rerun, self.recording.log
        lines = {
            f"{self._joint(name)}/{COMMANDED}": COMMANDED for name in self._layout.action_names
        } | dict.fromkeys(self._measured(), MEASURED)
        for path, kind in lines.items():
            log(path, rerun.SeriesLines(colors=COLORS[kind], names=kind), static=True)
        for name in self._layout.action_names:
            dots = rerun.SeriesPoints(colors=COLORS[PLANNED], names=PLANNED, marker_sizes=1.5)
            log(f"{self._joint(name)}/{PLANNED}", dots, static=True)
        log(SEAM, rerun.SeriesPoints(names="seam", marker_sizes=3.0), static=True)

    # Messages

    def _times(self, times_ns: NDArray[np.int64]) -> list[Any]:
        shown = (times_ns - self._layout.origin_ns).astype("timedelta64[ns]")
        return [self._rerun.TimeColumn(TIMELINE, duration=shown)]

    def _series(self, path: str, times: list[Any], values: NDArray[Any]) -> None:
        columns = self._rerun.Scalars.columns(scalars=values.astype(np.float64))
        self.recording.send_columns(path, times, columns)

    def ticks(self, ticks: Columns) -> None:
        """Log n commands, and the seams among them; columns of the queue ``ticks``."""
        times = self._times(ticks["time_ns"])
        for index, name in enumerate(self._layout.action_names):
            self._series(f"{self._joint(name)}/{COMMANDED}", times, ticks["command"][:, index])
        for path, seconds in ((LATENESS, ticks["lateness_s"]), (AGE, ticks["age_s"])):
            known = np.isfinite(seconds)
            if known.any():
                self._series(path, self._times(ticks["time_ns"][known]), seconds[known] * 1e3)
        self._seams(ticks)

    def _seams(self, ticks: Columns) -> None:
        for row in range(len(ticks["number"])):
            number, attempt, source = (
                int(ticks[name][row]) for name in ("number", "attempt", "source")
            )
            command = ticks["command"][row]
            if self._last is not None:
                before, same_attempt, last_source, last = self._last
                if (number, attempt) == (before + 1, same_attempt) and 0 <= last_source != source:
                    jump = np.abs(command - last).max(keepdims=True)
                    self._series(SEAM, self._times(ticks["time_ns"][row : row + 1]), jump)
            self._last = number, attempt, source, command

    def states(self, states: Columns) -> None:
        """Log n measured states; columns of the queue ``states``."""
        times = self._times(states["time_ns"])
        for path, values in zip(self._measured(), states["state"].T, strict=True):
            self._series(path, times, values)

    def chunk(self, chunk: Columns) -> None:
        """Log the stages of a chunk when it arrived, and its actions when they are due."""
        arrived = self._times(chunk["time_ns"].reshape(1))
        for stage, duration_ns in zip(STAGES, chunk["stages_ns"], strict=True):
            if duration_ns:
                self._series(f"timing/stages/{stage}", arrived, duration_ns.reshape(1) / 1e6)
        count, step_ns = int(chunk["count"]), self._layout.step_s * 1e9
        due = self._times(chunk["first_ns"] + np.round(np.arange(count) * step_ns).astype(np.int64))
        for index, name in enumerate(self._layout.action_names):
            self._series(f"{self._joint(name)}/{PLANNED}", due, chunk["actions"][:count, index])

    def text(self, time_ns: int, line: str) -> None:
        """Log a line of text."""
        times = self._times(np.array([time_ns], np.int64))
        self.recording.send_columns(TEXTS, times, self._rerun.TextLog.columns(text=[line]))

    def picture(self, camera: str, time_ns: int, picture: NDArray[np.uint8]) -> None:
        """Log a picture, (height, width, 3) uint8 RGB, as JPEG."""
        data = jpeg.codec().encode_jpeg(picture, quality=QUALITY, colorspace="RGB")
        times = self._times(np.array([time_ns], np.int64))
        shown = self._rerun.EncodedImage.columns(blob=[data], media_type=["image/jpeg"])
        self.recording.send_columns(self._camera(camera), times, shown)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is in the file or with the viewer; False after ``timeout_s``.

        Raises:
            LiveViewError: The viewer was closed.
            OSError: The file cannot be written.
        """
        try:
            if self._file is None:
                self.recording.flush(timeout_sec=timeout_s)
            else:
                self._file.write(self._stream.read(flush_timeout_sec=timeout_s) or b"")
                self._file.flush()
        except RuntimeError as error:
            if "timed out" in str(error):
                return False
            raise LiveViewError(str(error)) from error
        return True

    def close(self) -> None:
        """Close the file. Idempotent. A viewer goes on."""
        if self._file is not None:
            self._file.close()


def _open_viewer() -> None:
    """Start the viewer, which goes on when this process has ended.

    Raises:
        LiveViewError: It does not open.
    """
    port = str(urlsplit(VIEWER_URL).port)
    command = [sys.executable, "-m", "rerun", "--port", port, "--bind", "127.0.0.1"]
    viewer = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    deadline_s = time.monotonic() + OPENS_WITHIN_S
    while not _listens(VIEWER_URL, CONNECTS_WITHIN_S):
        if viewer.poll() is not None or time.monotonic() > deadline_s:
            viewer.kill()
            raise LiveViewError(
                "--rerun: the viewer does not open; expected a display (or --rerun "
                f"FILE{FILE_SUFFIX})"
            )
        time.sleep(OPENING_S)
    time.sleep(OPENING_S)
    if viewer.poll() is not None:  # it listens before it has a window
        raise LiveViewError("--rerun: the viewer was closed")


def _listens(url: str, timeout_s: float) -> bool:
    """Whether there is a server at the host and port of ``url``."""
    parts = urlsplit(url)
    with contextlib.suppress(OSError):
        socket.create_connection((parts.hostname or "", parts.port or 9876), timeout_s).close()
        return True
    return False
