"""``make gateways``: the long tests of the gateways and their benchmarks, one after the other.

Prints everything, and writes it to ``bench/results/gateways.txt``. The other systems' own clients
are found by environment variables, which ``bench/gateways/*.py`` name; what is missing is said.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench" / "results" / "gateways.txt"
TESTS = ("-m", "pytest", "tests/gateway", "-m", "long", "-q", "-p", "no:cacheprovider")
BENCHMARKS = ("ilstudio", "openpi", "lerobot", "fairness")
NO_TESTS = 5
"""Pytest's exit status where no test is selected."""


def run(title: str, *words: str) -> tuple[int, str]:
    """Run Python with ``words``, whose output is shown at once; return status and output."""
    lines = [f"== {title}\n"]
    print(lines[0], end="", flush=True)
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode not in (0, NO_TESTS):
        lines.append(f"failed with exit status {process.returncode}\n")
        print(lines[-1], end="", flush=True)
    return process.returncode, "".join(lines)


def main() -> int:
    results = [run("tests/gateway, long", *TESTS)]
    for name in BENCHMARKS:
        if (ROOT / "bench" / "gateways" / f"{name}.py").is_file():
            results.append(run(f"bench.gateways.{name}", "-m", f"bench.gateways.{name}"))
        else:
            results.append((0, f"== bench.gateways.{name}\nabsent\n"))
    RESULT.write_text("\n".join(text for _, text in results), encoding="utf-8")
    print(f"written to {RESULT.relative_to(ROOT)}")
    return int(any(status not in (0, NO_TESTS) for status, _ in results))


if __name__ == "__main__":
    raise SystemExit(main())
