"""``make gateways``: the long tests of the gateways and their benchmarks, one after the other.

    python -m bench.gateways [--quick] [--only WORD]

Prints everything, and writes it to ``bench/results/gateways.txt``, without this machine's paths. A
part that fails does not end the others; the last lines say which parts passed, failed or were
skipped. The other systems' own clients are found by environment variables (``PEERS``).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.records import processor
from policies.command_line import CommandLine

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench" / "results" / "gateways.txt"
PEERS = (
    "METRONOME_ILSTUDIO",
    "METRONOME_ILSTUDIO_PYTHON",
    "METRONOME_OPENPI_PYTHON",
    "METRONOME_OPENPI_SOURCE",
    "METRONOME_LEROBOT_PYTHON",
    "METRONOME_LEROBOT_SOURCE",
    "METRONOME_GROOT_PYTHON",
    "METRONOME_GROOT_SOURCE",
)
"""Environment variables: an interpreter, or a folder."""
LIMIT_S = 3600.0
"""A part that takes longer has failed."""
NO_TESTS = 5
"""Pytest's exit status where no test is selected."""
SKIPPED = -1


@dataclass(frozen=True)
class Part:
    """One program of the run.

    Attributes:
        title: Its name in the table.
        words: Arguments of Python.
        needs: Environment variables without which it is skipped.
        quick: More arguments and environment variables (``NAME=VALUE``) of a quick run.
    """

    title: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


@dataclass
class Report:
    """What is printed and written."""

    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        shown = without_paths(line.rstrip("\n"), os.environ)
        print(shown, flush=True)
        self.lines.append(shown + "\n")


def parts() -> list[Part]:
    """The files of long tests, then the benchmarks."""
    files = sorted((ROOT / "tests" / "gateway").glob("test_*.py"))
    tests = [
        Part(
            f"tests/gateway/{path.name}",
            (
                "-m",
                "pytest",
                f"tests/gateway/{path.name}",
                *["-m", "long", "-q", "-p", "no:cacheprovider"],
            ),
            quick=("METRONOME_ILSTUDIO_SEEDS=1",),
        )
        for path in files
        if "mark.long" in path.read_text(encoding="utf-8")
    ]
    blocks = ("--blocks", "2")
    ilstudio, openpi, lerobot = PEERS[:2], PEERS[2:4], PEERS[4:5]
    return [
        *tests,
        Part("bench.gateways.ilstudio", ("-m", "bench.gateways.ilstudio"), ilstudio, blocks),
        Part("bench.gateways.openpi", ("-m", "bench.gateways.openpi"), openpi, blocks),
        Part("bench.gateways.lerobot", ("-m", "bench.gateways.lerobot"), lerobot, blocks),
        Part(
            "bench.gateways.fairness",
            ("-m", "bench.gateways.fairness"),
            (),
            ("FAIRNESS_SECONDS=5",),
        ),
    ]


def without_paths(text: str, environment: Mapping[str, str]) -> str:
    """``text`` without the paths of this machine: ``.`` for the repository, names for peers."""
    known = {environment[name]: f"${name}" for name in PEERS if environment.get(name)}
    known |= {str(ROOT): ".", sys.prefix: "$PYTHON", tempfile.gettempdir(): "$TMP"}
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, known[path])
    return re.sub(r"(?<![\w.$/:~-])/([\w.+-]+)/([\w.+/-]*)", _shortened, text)


def _shortened(match: re.Match[str]) -> str:
    """The last part of a path, if its first is a folder of this machine."""
    if not Path("/", match[1]).is_dir():
        return match[0]
    return f".../{match[2].rstrip('/').rpartition('/')[2]}"


def run(part: Part, quick: bool, report: Report) -> int:
    """Run a part, whose output is shown at once; return its exit status, or ``SKIPPED``."""
    report.say(f"\n== {part.title}; load average {os.getloadavg()[0]:.1f}")
    missing = [name for name in part.needs if not os.environ.get(name)]
    if missing:
        report.say(f"skipped: {' and '.join(missing)} not set")
        return SKIPPED
    more = part.quick if quick else ()
    variables = dict(word.split("=", 1) for word in more if "=" in word)
    flags = [word for word in more if "=" not in word]
    last = ""
    with subprocess.Popen(
        [sys.executable, *part.words, *flags],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        limit = threading.Timer(LIMIT_S, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                report.say(line)
                last = line
        finally:
            limit.cancel()
            limit.join()
    status = process.returncode
    if status == NO_TESTS or (
        status == 0 and re.search(r"\d skipped", last) and "passed" not in last
    ):
        return SKIPPED
    if status:
        report.say(f"failed with exit status {status}")
    return status


def say_what_is_found(report: Report) -> None:
    """Name the machine's processor and the peers, and what is missing."""
    report.say(f"{processor()}, {os.cpu_count()} cores; load average {os.getloadavg()[0]:.1f}")
    for name in PEERS:
        value = os.environ.get(name)
        found = "not set" if not value else "found" if Path(value).exists() else "set, but absent"
        report.say(f"{name:26} {found}")


def main() -> int:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples; the figures mean little")
    parser.add_argument("--only", default="", metavar="WORD", help="parts with WORD in their name")
    flags = parser.parse_args()
    report, table = Report(), []
    say_what_is_found(report)
    if flags.quick:
        report.say("a quick run: few samples")
    for part in parts():
        if flags.only in part.title:
            began_s = time.monotonic()
            status = run(part, flags.quick, report)
            table.append((part.title, status, time.monotonic() - began_s))
    report.say("\n== summary")
    for title, status, took_s in table:
        word = {0: "passed", SKIPPED: "skipped"}.get(status, "failed")
        report.say(f"{word:8} {title:48} {took_s:6.0f} s")
    RESULT.write_text("".join(report.lines), encoding="utf-8")
    print(f"written to {RESULT.relative_to(ROOT)}")
    return int(any(status not in (0, SKIPPED) for _, status, _ in table))


if __name__ == "__main__":
    raise SystemExit(main())
