"""Reads a checkpoint's statistics, which others write as pickle, without trusting it.

A pickle is a program. This unpickler lets it build numpy arrays, numpy scalars and plain containers
and refuses to look up anything else, before anything of it has run.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from policies.errors import CheckpointError

MAX_BYTES = 64 * 2**20

_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"numpy.{core}.{name}", function)
        for core in ("core", "_core")
        for name, function in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        # numpy 1 and 2 renamed the module; either one's pickles are read under either.
        if module.startswith("numpy.core") and not hasattr(np, "core"):
            module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it asks for the object {pid!r} from outside")


def read_pickle(path: Path) -> Any:
    """What ``path`` holds: dicts, lists, tuples, strings, numbers and numpy arrays.

    Raises:
        CheckpointError: No such file, too large, not a pickle, or one that asks for anything else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, expected at most {MAX_BYTES}")
        return _Unpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, {error}; expected numpy arrays and plain containers"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle may raise anything at all
        raise CheckpointError(f"{path}: not a readable pickle ({error!r})") from error
