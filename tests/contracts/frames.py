"""The messages that the channel tests send."""

from __future__ import annotations

import numpy as np

from transport.schema import ArraySpec, Schema

OBSERVATION = Schema(
    (
        ArraySpec("image", "uint8", (48, 64, 3)),
        ArraySpec("odd", "uint8", (7,)),
        ArraySpec("state", "float32", (14,)),
        ArraySpec("stamp", "int64", ()),
    )
)
CHUNK = Schema((ArraySpec("actions", "float32", (10, 14)), ArraySpec("stages", "int64", (8,))))


def observation(seed: int) -> dict[str, np.ndarray]:
    return random_arrays(OBSERVATION, seed)


def chunk(seed: int) -> dict[str, np.ndarray]:
    return random_arrays(CHUNK, seed)


def random_arrays(schema: Schema, seed: int) -> dict[str, np.ndarray]:
    """Every bit pattern, NaNs among them."""
    generator = np.random.default_rng(seed)
    return {
        name: np.frombuffer(generator.bytes(spec.nbytes), spec.dtype).reshape(spec.shape)
        for name, spec in schema.specs.items()
    }
