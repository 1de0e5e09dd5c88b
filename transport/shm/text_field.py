"""Texts in shared memory: UTF-8 in an array of bytes, padded with zeros."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def put_text(view: NDArray[np.uint8], text: str) -> None:
    """Write ``text`` as UTF-8 into the text field ``view``, cut to its length."""
    data = text.encode()[: view.size]
    view[: len(data)] = np.frombuffer(data, np.uint8)
    view[len(data) :] = 0


def get_text(view: NDArray[np.uint8]) -> str:
    """The text that ``put_text`` wrote into ``view``."""
    return view.tobytes().rstrip(b"\0").decode(errors="replace")
