"""Keys of the operator, who starts rollouts, judges them, and stops the arm with any key."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Mapping

QUIT = "q"
"""The key that ends the session."""


class OperatorConsole:
    """Single keys from standard input, a terminal or a pipe. A context manager.

    Inside the context a terminal delivers keys without Enter; Ctrl-C still raises SIGINT.

    Args:
        show: Prints a line.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._fd = sys.stdin.fileno()
        self._before: list[object] | None = None
        self._ended = False

    def __enter__(self) -> OperatorConsole:
        with contextlib.suppress(termios.error):
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)  # type: ignore[arg-type]

    def key(self, timeout_s: float = 0.0) -> str:
        """The next key pressed within ``timeout_s``; empty if there is none."""
        if self._ended:
            time.sleep(timeout_s)  # a loop that waits for keys must not become a busy loop
            return ""
        if not select.select([self._fd], [], [], timeout_s)[0]:
            return ""
        data = os.read(self._fd, 1)
        self._ended = not data
        return data.decode(errors="replace")

    def ask(self, question: str, choices: Mapping[str, str], meanwhile: Callable[[], None]) -> str:
        """Print a question and wait for one of the keys of ``choices``.

        Args:
            question: Printed with the choices.
            choices: Key to meaning.
            meanwhile: Called while waiting, 100 times a second or more.

        Returns:
            The key; ``QUIT`` if standard input has ended.
        """
        named = {"\n": "Enter"}
        offered = ", ".join(f"[{named.get(key, key)}] {text}" for key, text in choices.items())
        self._show(f"{question}  {offered}")
        while not self._ended:
            meanwhile()
            key = self.key(0.01).lower()
            if key in choices:
                return key
        return QUIT
