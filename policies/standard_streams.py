"""Standard streams for commands, such that a failed write does not end the command.

A reader that has exited (``| head``), a full disk behind ``>``, a closed stream (``>&-``) or a
terminal that lacks a character must end neither a rollout nor a server with connected robots.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

FAILED, INTERRUPTED = 1, 130


class NonFailingStream:
    """A text stream that discards its output after a write has failed.

    All other attributes are those of the wrapped ``stream``.

    Attributes:
        failure: The error that lost output; empty if there is none or the reader has exited.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.failure = stream, ""
        with contextlib.suppress(AttributeError, ValueError, OSError):
            # A terminal that cannot show a character shows a question mark.
            stream.reconfigure(errors="replace")  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``; return its length whether or not the write succeeds."""
        with self._ignore_errors():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of ``lines`` as ``write`` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream; a failure is recorded, not raised."""
        with self._ignore_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _ignore_errors(self) -> Any:
        try:
            yield
        except (OSError, ValueError) as error:  # ``ValueError``: it was closed
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                self.failure = str(error)
            with contextlib.suppress(OSError, ValueError):
                # The buffered rest is written at exit, where it would fail again.
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, self._stream.fileno())
                os.close(devnull)


def run_command(main: Callable[[], int | None]) -> int:
    """Call ``main`` with standard streams that exist and do not fail; return the exit status.

    It is ``FAILED`` if ``main`` succeeds and its output is lost, e.g. on a full disk. It is
    ``INTERRUPTED``, without a traceback, after a Ctrl-C that ``main`` does not handle.
    """
    streams: Any = sys
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            _open_descriptor(number)
            devnull = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115  until exit
            setattr(streams, name, devnull)
        elif mode == "w":
            setattr(streams, name, NonFailingStream(getattr(sys, name)))
    try:
        status = main() or 0
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        status = INTERRUPTED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    lost = getattr(sys.stdout, "failure", "")
    if lost:
        sys.stderr.write(f"error: the output cannot be written: {lost}\n")
    return status or (FAILED if lost else 0)


def _open_descriptor(descriptor: int) -> None:
    """Open the null device as ``descriptor`` if it is closed.

    Otherwise the next socket would get the number 0, 1 or 2, and child processes would print to it.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)
