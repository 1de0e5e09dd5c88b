"""Seed inputs of the fuzz targets: ``python -m tests.fuzz.corpus`` writes ``corpus/TARGET/``.

A structured target needs little, since its empty input is the valid message; a raw one needs what
crosses the wire.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path

from runtime.protocol import messages
from tests.fuzz import gateway_groot, gateway_lerobot, samples
from tests.fuzz.targets import TARGETS
from transport.handshake_messages import Opcode

FOLDER = Path(__file__).with_name("corpus")
_SEED = 20240607


def _raw() -> Mapping[str, list[bytes]]:
    """Whole messages, for the targets or modes that take bytes as they are."""
    errors = [
        messages.encode_error(messages.ContractMismatch("state", "int32", "float32")),
        messages.encode_error(messages.InferenceError("late")),
    ]
    top, wrist = samples.jpegs()
    return {
        "control": [
            samples.control(Opcode.DESCRIBE, {}),
            samples.control(Opcode.HELLO, samples.hello()),
            samples.control(Opcode.HELLO, samples.hello(80)),
            samples.control(Opcode.WELCOME, samples.welcome(), samples.EPOCH),
            samples.control(Opcode.DESCRIPTION, samples.description()),
            samples.control(Opcode.BYE, {"reason": "done"}, samples.EPOCH),
        ],
        "error": [b"\1" + error for error in errors],
        "schema": [
            b"\7" + samples.REPLY.to_json().encode(),
            b"\7" + samples.VARYING.to_json().encode(),
        ],
        "jpeg": [b"\2" + top, b"\3" + wrist],
        "description": [b"\7\0" + samples.CONTRACT.to_json().encode()],
        "openpi_frame": [*samples.openpi_frames()],
        # HELLO, the proof, CONFIRM of shared memory.
        "handshake": [bytes(6) + bytes((160, 0, 0, 0)) + bytes((0, 0, 0, 0, 8, 0))],
        "lerobot_pickle": [b"\7" + content for content in gateway_lerobot.VALID],
        "groot_npy": [b"\7" + gateway_groot.write_npy(array) for array in gateway_groot.ARRAYS],
        "groot_request": [
            b"\7" + gateway_groot.packed(0),
            b"\x0f" + gateway_groot.packed(1),
            b"\x08",
        ],
        "groot_zmtp": [b"\7\xff" + gateway_groot.CONNECTION, b"\7\0" + gateway_groot.CONNECTION],
        "broken": [bytes(8)],
    }


def seeds(name: str) -> list[bytes]:
    """The seeds of one target; the same at every call."""
    generator = random.Random(f"{_SEED} {name}")
    made = [bytes(64), *_raw().get(name, [])]
    return made + [generator.randbytes(size) for size in (16, 48, 96, 192)]


def write() -> None:
    """Write the seeds of all targets."""
    for name in TARGETS:
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, seed in enumerate(seeds(name)):
            (folder / f"{number:02d}").write_bytes(seed)


if __name__ == "__main__":
    write()
