"""The recorder process as its parent, an evaluation, sees it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from runtime.datasets.dataset_writer import is_written_to
from runtime.datasets.errors import DatasetError, RecorderFailed
from runtime.datasets.features import DatasetFeatures
from runtime.datasets.layout import INFO, read_info, remove_abandoned_spools
from transport.child_process import ChildProcess
from transport.errors import ChildFailed

READY_WITHIN_S = 60.0
RECORDED_WITHIN_S = 600.0
"""For the episodes that are still being encoded when the evaluation ends."""
POLL_S = 0.01
RECORDER_WITHIN_S = 30.0
"""For the recorder to be there; then it counts as ended."""


class DatasetRecorder:
    """Records finished episodes in a process of its own.

    Args:
        root: The dataset's folder; new, or a dataset with the same features.
        features: What every episode has in common.

    Attributes:
        episodes: Episodes in the dataset, with those before.

    Raises:
        DatasetError: The dataset cannot be created or continued; the message says why.
    """

    def __init__(self, root: Path, features: DatasetFeatures) -> None:
        self.root, self.features = root.resolve(), features
        self._pending = 0
        self._failure = ""
        self._process = ChildProcess(
            "runtime.datasets.recorder_process",
            ["--dataset", str(self.root), "--features", features.to_json()],
            name="the dataset's recorder",
            outlives=True,
        )
        try:
            self.episodes = int(self._process.wait_ready(READY_WITHIN_S)["episodes"])
        except ChildFailed as failed:
            self._process.close()
            raise DatasetError(failed.error or str(failed)) from failed
        except BaseException:
            self._process.close()
            raise

    @property
    def pending(self) -> int:
        """Episodes that are not recorded yet. Raises as ``poll``."""
        self.poll()
        return self._pending

    def add(self, folder: Path) -> None:
        """Record the complete spool in ``folder``; returns at once. Raises as ``poll``."""
        self.poll()
        self._pending += 1
        self._process.send_line(str(folder))

    def poll(self) -> None:
        """Take the recorder's news.

        Raises:
            RecorderFailed: An episode could not be recorded, or the process ended.
        """
        for event in self._process.events():
            if event["event"] == "recorded":
                self.episodes += 1
                self._pending -= 1
            elif event["event"] == "failed":
                self._failure = self._failure or event["error"]
            elif event["event"] == "ended":
                self._failure = self._failure or f"the recorder ended: {self._process.status}"
        if self._failure:
            raise RecorderFailed(f"dataset {self.root}: {self._failure}")

    def finish(self) -> None:
        """Wait until every episode is recorded. Raises as ``poll``, or after a long time.

        What processes that died meanwhile left half written is removed.
        """
        deadline_s = time.monotonic() + RECORDED_WITHIN_S
        while self.pending:
            if time.monotonic() > deadline_s:
                raise RecorderFailed(
                    f"dataset {self.root}: {self._pending} episodes were not encoded within "
                    f"{RECORDED_WITHIN_S:g} s"
                )
            time.sleep(POLL_S)
        remove_abandoned_spools(self.root)

    def close(self) -> None:
        """End the process, which first finishes the episodes it has. Idempotent."""
        self._process.close(RECORDED_WITHIN_S)

    def __enter__(self) -> DatasetRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def recorded_episodes(root: Path) -> int:
    """Wait until no process writes to the dataset ``root``, and return its number of episodes.

    The recorder of a killed evaluation first finishes the episodes that it has.

    Raises:
        DatasetError: Somebody writes to it for a long time, or it cannot be read.
    """
    deadline_s = time.monotonic() + RECORDED_WITHIN_S
    while root.exists() and is_written_to(root):
        if time.monotonic() > deadline_s:
            raise DatasetError(
                f"{root}: another process has written to this dataset for {RECORDED_WITHIN_S:g} s, "
                "expected none"
            )
        time.sleep(POLL_S)
    return int(read_info(root)["total_episodes"]) if (root / INFO).exists() else 0


def wait_recorded(folder: Path) -> None:
    """Wait until the recorder has taken the spool in ``folder``, from any process.

    So no process is more than one episode ahead, and the disk holds few raw pictures.

    Raises:
        RecorderFailed: The recorder has ended, or does not start.
    """
    root = folder.parent.parent
    seen_s = time.monotonic()
    while folder.exists():
        if is_written_to(root):
            seen_s = time.monotonic()
        elif time.monotonic() - seen_s > RECORDER_WITHIN_S:
            shutil.rmtree(folder, ignore_errors=True)
            raise RecorderFailed(f"dataset {root}: its recorder has ended")
        time.sleep(POLL_S)
