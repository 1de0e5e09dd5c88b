"""Start a process that a robot needs beside it: its simulator, or the owner of its devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from robots import errors
from robots.errors import ConnectFailed
from transport.child_process import ChildProcess
from transport.errors import ChildFailed


def start_companion(
    module: str,
    arguments: Sequence[str],
    *,
    name: str = "",
    ready_within_s: float = 60.0,
    pass_fds: Iterable[int] = (),
    outlives: bool = False,
    interpreter: str = sys.executable,
) -> ChildProcess:
    """Start ``python -m module arguments… --parent PID`` and wait until it is ready.

    The other arguments are those of ``ChildProcess``.

    Raises:
        ConnectFailed: It did not become ready; carries the reason. Another class of
            ``robots.errors`` if the child names one.
    """
    child = ChildProcess(
        module,
        [*arguments, "--parent", str(os.getpid())],
        name=name,
        pass_fds=pass_fds,
        outlives=outlives,
        interpreter=interpreter,
    )
    try:
        child.wait_ready(ready_within_s)
    except BaseException as error:
        child.close(0.0)
        if isinstance(error, ChildFailed):
            raise getattr(errors, error.kind, ConnectFailed)(str(error)) from error
        raise
    return child
