"""Steps that go wrong in their own ways: ``python -m tests.bench.stub_steps``."""

from __future__ import annotations

import os
import signal
import sys
import time

from bench.inference.steps import StepFailed, main


def fine(say, arguments):
    return {"got": list(arguments)}


def not_well(say, arguments):
    return {"found": 1, "ok_so_far": False}


def fails(say, arguments):
    say({"so far": 1})
    raise StepFailed("torch 2.11 sees no GPU")


def raises(say, arguments):
    raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")


def dies(say, arguments):
    say({"so far": 2})
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(say, arguments):
    say({"so far": 3})
    time.sleep(60)


STEPS = {each.__name__: each for each in (fine, not_well, fails, raises, dies, hangs)}

if __name__ == "__main__":
    raise SystemExit(main(STEPS, sys.argv[1:]))
