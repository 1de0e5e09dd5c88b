"""One target under libFuzzer, in this process: ``python -m tests.fuzz.one TARGET TALLY [FLAG...]``.

Only our own packages are instrumented, but for what numba compiles: instrumented bytecode is not
what it can compile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from pathlib import Path

import atheris

from tests.fuzz.feed import reached
from tests.fuzz.targets import open_target

PACKAGES = ["transport", "runtime", "policies"]
COMPILED = ["transport.shm.atomics", "transport.shm.ring_kernels", "runtime.gateway.planes"]
TELL_EVERY = 1024


def main(argv: list[str]) -> None:
    """Does not return: libFuzzer ends the process.

    Args:
        argv: Name of the target; file for how often which gate was passed; libFuzzer's flags.
    """
    name, tally, *flags = argv
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("error")
    last = max((int(flag[6:]) for flag in flags if flag.startswith("-runs=")), default=0)
    count = 0
    with contextlib.ExitStack() as stack:
        with atheris.instrument_imports(include=PACKAGES, exclude=COMPILED):
            target = stack.enter_context(open_target(name))

        def counted(data: bytes) -> None:
            nonlocal count
            count += 1
            target(data)
            if count % TELL_EVERY == 0 or count == last:
                Path(tally).write_text(json.dumps(reached))

        atheris.Setup(["fuzz", *flags], counted)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
