"""Changed copies of known inputs, for where no coverage-guided fuzzer is installed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.fuzz.targets import Target

MAX_BYTES, MAX_RANDOM_BYTES = 4096, 96
_EDGES = (0, 1, 3, 7, 0x7F, 0x80, 0xFE, 0xFF)


class Violation(AssertionError):
    """What a target raised, with the input that made it.

    Attributes:
        data: The input.
    """

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(f"{error!r} of {data[:200].hex()}")
        self.data = data


def hammer(target: Target, seeds: Sequence[bytes], runs: int, seed: int) -> None:
    """Each of ``seeds`` as it is, then ``runs`` others: mutations of them, and noise for a third.
    The same ones for the same ``seed``.

    Raises:
        Violation: What the target raised is its cause.
    """
    generator = random.Random(seed)
    for number in range(len(seeds) + runs):
        if number < len(seeds):
            data = seeds[number]
        elif number % 3 == 0:
            data = generator.randbytes(generator.randint(1, MAX_RANDOM_BYTES))
        else:
            data = mutated(generator.choice(seeds), generator)
        try:
            target(data)
        except Exception as error:
            raise Violation(data, error) from error


def mutated(data: bytes, generator: random.Random) -> bytes:
    """``data`` with one to five changes."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 5)):
        at, size = generator.randint(0, len(changed)), generator.randint(1, 8)
        kind = generator.randrange(6)
        if kind == 0:
            changed[at : at + 1] = generator.randbytes(1)
        elif kind == 1:
            changed[at : at + 1] = bytes((generator.choice(_EDGES),))
        elif kind == 2:
            changed[at:at] = generator.randbytes(size)
        elif kind == 3:
            del changed[at : at + size]
        elif kind == 4:
            changed[at : at + size] = generator.randbytes(size)
        else:
            start = generator.randint(0, len(changed))
            changed[at:at] = changed[start : start + size]
    return bytes(changed[:MAX_BYTES])
