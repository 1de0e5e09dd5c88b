"""A drawing as a small picture: without loss, but of few colours and with hard edges."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

SHADES = (1.0, 0.4)
"""Of each colour, on white: its own, and what pale lines need."""


def save_picture(figure: Figure, path: Path, colours: Iterable[str], *, dpi: int = 72) -> None:
    """Write ``figure`` as WebP, in ``colours``, black, and shades of both on white.

    Edges are not smoothed: that would double the file.
    """
    for artist in figure.findobj(lambda each: hasattr(each, "set_antialiased")):
        artist.set_antialiased(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    chosen = [np.array(to_rgb(name)) for name in dict.fromkeys((*colours, "black"))]
    shades = [np.ones(3), *(1 - (1 - rgb) * part for rgb in chosen for part in SHADES)]
    palette = np.round(255 * np.array(shades)).astype(np.int32)
    pixels = np.asarray(Image.open(drawn).convert("RGB"))
    there, where = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    # Not Pillow's quantize: it takes neighbouring colours for one, and a legend has them apart.
    nearest = np.square(there[:, None].astype(np.int32) - palette).sum(axis=2).argmin(axis=1)
    few = palette.astype(np.uint8)[nearest[where.ravel()]].reshape(pixels.shape)
    Image.fromarray(few).save(path, "webp", lossless=True, quality=100, method=6)
