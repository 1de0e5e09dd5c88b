"""The file of one GPU's results, complete after every step: ``bench/results/GPU.json``.

``python -m bench.inference.gpu_results FILE...`` adds files from other folders to those here.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.record_files import as_text

RESULTS = Path(__file__).parents[1] / "results"
GPU = "gpu"
"""Key of the GPU's name; the others are parts."""


class GpuResults:
    """Records of steps, by part and by the step's name.

    A reader finds the file as it was before a change or after it, never in between, whenever the
    writer is killed. One process writes it at a time.

    Args:
        folder: Made if it does not exist.
        gpu: The GPU's name, as torch has it.
    """

    def __init__(self, folder: Path, gpu: str) -> None:
        self.gpu, self.path = gpu, folder / f"{file_stem(gpu)}.json"

    def put(self, part: str, step: str, record: Mapping[str, Any]) -> None:
        """Write the record of one step; the others stay."""
        self.merge({part: {step: record}})

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add all steps of another file's content; those of the same name are replaced."""
        content = self.read()
        for part, steps in other.items():
            if part != GPU:
                content.setdefault(part, {}).update(steps)
        write_json(self.path, content)

    def read(self) -> dict[str, Any]:
        """Return what the file holds: the GPU's name, and each part's steps.

        Raises:
            ValueError: It is no such file.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {GPU: self.gpu}
        if not isinstance(content, dict) or GPU not in content:
            raise ValueError(f"{self.path}: got another file, expected results of a GPU")
        return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at once; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = as_text(_finite(content))
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def file_stem(gpu: str) -> str:
    """e.g. ``nvidia-h200`` for ``NVIDIA H200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "gpu"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def main(paths: Sequence[str]) -> int:
    """Add files to those in ``bench/results``."""
    for name in paths:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        results = GpuResults(RESULTS, content[GPU])
        results.merge(content)
        print(results.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
