"""JPEG from a peer: held against what was declared before anything is decoded."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import jpeg
from policies.errors import ObservationError

simplejpeg = pytest.importorskip("simplejpeg")
SHAPE = (48, 64, 3)


def picture(seed: int = 0) -> np.ndarray:
    """Smooth, as cameras' pictures are."""
    rows, columns = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
    waves = [np.sin(rows / (7 + seed) + n) + np.cos(columns / (9 + seed) - n) for n in range(3)]
    return (127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)


def decode(data: bytes, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    out = np.full(shape, 7, np.uint8)
    jpeg.decode(np.frombuffer(data, np.uint8), out)
    return out


def test_a_picture_comes_back_nearly_as_it_was() -> None:
    error = np.abs(decode(jpeg.encode(picture(), 95)).astype(int) - picture())
    assert error.mean() < 2
    assert error.max() < 30


def test_what_is_not_contiguous_is_encoded_as_it_looks() -> None:
    strided = np.repeat(picture(), 2, axis=1)[:, ::2]
    assert jpeg.encode(strided, 90) == jpeg.encode(picture(), 90)


@pytest.mark.parametrize("quality", [1, 50, 100])
@pytest.mark.parametrize("hw", [(1, 1), (15, 17), (48, 64), (33, 16)])
def test_no_picture_becomes_longer_than_declared(hw: tuple[int, int], quality: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*hw, 3), np.uint8)
    assert len(jpeg.encode(noise, quality)) <= jpeg.max_bytes(hw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: patched(data, height=4000), r"got 8 bit \(4000, 64, 3\), expected 8 bit"),
        (lambda data: patched(data, width=65500), r"\(48, 65500, 3\)"),
        (lambda data: patched(data, height=47), r"\(47, 64, 3\)"),
        (lambda data: patched(data, components=1), r"\(48, 64, 1\)"),
        (lambda data: patched(data, precision=12), "got 12 bit"),
        (lambda data: patched(data, marker=0xC2), "progressive"),
        (lambda data: patched(data, marker=0xC9), "progressive"),
        (lambda data: b"\x89PNG" + data, "expected a JPEG"),
        (lambda data: b"", "expected a JPEG"),
        (lambda data: data[:2], "truncated header"),
        (lambda data: data[:100], "truncated header"),
    ],
)
def test_what_was_not_declared_is_refused_before_it_is_decoded(
    change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = change(jpeg.encode(picture(), 90))
    monkeypatch.setattr(jpeg, "codec", lambda: pytest.fail("the decoder was asked"))
    with pytest.raises(ObservationError, match=message):
        decode(data)


def test_a_scan_of_one_colour_is_refused() -> None:
    data = bytearray(jpeg.encode(picture(), 90))
    at = data.index(b"\xff\xda")
    data[at + 4] = 1
    with pytest.raises(ObservationError, match="several scans"):
        decode(bytes(data))


def test_a_real_progressive_file_is_refused() -> None:
    """A few kilobytes of scans could keep a decoder busy for minutes."""
    data = jpeg.encode(picture(), 90).replace(b"\xff\xc0", b"\xff\xc2", 1)
    with pytest.raises(ObservationError, match="progressive"):
        decode(data)


@pytest.mark.parametrize("left", [0.3, 0.6, 0.99])
def test_a_truncated_picture_is_an_error_and_not_half_a_picture(left: float) -> None:
    data = jpeg.encode(picture(), 90)
    with pytest.raises(ObservationError, match="JPEG"):
        decode(data[: int(left * len(data))])


@given(st.binary(max_size=600), st.integers(0, 2000))
def test_whatever_comes_is_a_picture_or_an_error(noise: bytes, at: int) -> None:
    good = jpeg.encode(picture(), 80)
    for data in (noise, good[:at] + noise, good[:at] + noise + good[at + len(noise) :]):
        try:
            assert decode(data).shape == SHAPE
        except ObservationError as error:
            assert "JPEG" in str(error)


def test_without_the_codec_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(jpeg.JpegMissing, match=r"pip install simplejpeg"):
        jpeg.encode(picture(), 90)


def patched(data: bytes, *, marker: int = 0xC0, **fields: int) -> bytes:
    """``data`` with other values in its start-of-frame segment."""
    at = data.index(b"\xff\xc0")
    names = ("precision", "height", "width", "components")
    values = dict(zip(names, struct.unpack_from(">BHHB", data, at + 4), strict=True)) | fields
    changed = bytearray(data)
    changed[at + 1] = marker
    struct.pack_into(">BHHB", changed, at + 4, *(values[name] for name in names))
    return bytes(changed)
