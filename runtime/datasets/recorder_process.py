"""The recorder process: encodes finished episodes and adds them to a dataset.

The evaluation starts it as ``python -m runtime.datasets.recorder_process``. Each line that it gets
is the folder of a ``SpooledEpisode``, which it removes when the episode is in the dataset. When its
standard input ends, it finishes what it has been given.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.datasets.dataset_writer import DatasetWriter
from runtime.datasets.errors import DatasetError
from runtime.datasets.features import DatasetFeatures
from runtime.datasets.spooled_episode import SpooledEpisode
from transport.child_process import send_event

NICENESS = 10
"""Encoding waits for a control loop or a policy on the same cores."""


def record(writer: DatasetWriter, folder: Path) -> None:
    """Add the episode in ``folder`` to the dataset, and remove the folder.

    Raises:
        DatasetError, OSError, ValueError: The episode does not fit, or cannot be read or written.
    """
    episode = SpooledEpisode.load(folder)
    send_event("recorded", episode=writer.take(episode), frames=len(episode))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recorder process. Returns the exit status."""
    cli = argparse.ArgumentParser(description="Started by the evaluations")
    cli.add_argument("--dataset", type=Path, required=True)
    cli.add_argument("--features", required=True, help="JSON")
    args = cli.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    features = DatasetFeatures.from_json(args.features)
    try:
        with DatasetWriter(args.dataset, features) as writer:
            send_event("ready", episodes=writer.episodes)
            for line in sys.stdin:
                record(writer, Path(line.removesuffix("\n")))
    except (DatasetError, ImportError, OSError, ValueError) as error:
        send_event("failed", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
