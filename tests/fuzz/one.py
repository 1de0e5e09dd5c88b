"""One target under libFuzzer, in this process: ``python -m tests.fuzz.one TARGET TALLY [FLAG...]``.

Only our own packages are instrumented. What is compiled by numba is imported before: instrumented
bytecode is not what it can compile.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import atheris
import numba  # noqa: F401  its import is long, and nothing in it is ours

PACKAGES = ["transport", "runtime", "policies"]
TELL_EVERY = 1024


def main(argv: list[str]) -> None:
    """Does not return: libFuzzer ends the process.

    Args:
        argv: Name of the target; file for how often which gate was passed; libFuzzer's flags.
    """
    import transport.atomics
    import transport.steps  # noqa: F401

    with atheris.instrument_imports(include=PACKAGES):
        from tests.fuzz.feed import reached
        from tests.fuzz.targets import opened
    name, tally, *flags = argv
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("error")
    last = max((int(flag[6:]) for flag in flags if flag.startswith("-runs=")), default=0)
    count = 0
    with opened(name) as target:

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
