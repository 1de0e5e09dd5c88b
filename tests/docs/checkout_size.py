"""What git tracks may weigh together: a clone is to stay small.

python -m tests.docs.checkout_size
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 66_000_000
LARGEST = 10


def tracked_bytes(root: Path) -> dict[str, int]:
    """Size of each tracked file that is there, by its path; empty if ``root`` is no checkout."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return {name: (root / name).lstat().st_size for name in names if (root / name).exists()}


def excess(sizes: Mapping[str, int], limit: int = LIMIT_BYTES) -> str:
    """What is wrong: total, limit and the largest files; empty if nothing is."""
    total = sum(sizes.values())
    if total <= limit:
        return ""
    largest = sorted(sizes.items(), key=lambda each: (-each[1], each[0]))[:LARGEST]
    return (
        f"error: tracked files: got {total:,} bytes, at most {limit:,}; the largest:\n"
        + "\n".join(f"{size:>12,}  {name}" for name, size in largest)
    )


def main(root: Path = ROOT, limit: int = LIMIT_BYTES) -> int:
    sizes = tracked_bytes(root)
    if not sizes:
        sys.stdout.write(f"tracked files: not counted, {root} is not a git checkout\n")
        return 0
    if said := excess(sizes, limit):
        sys.stderr.write(f"{said}\n")
        return 1
    sys.stdout.write(f"tracked files: {sum(sizes.values()):,} bytes of at most {limit:,}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
