"""Crop and resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policies.errors import ContractMismatch
from policies.images import prepare
from policies.types import CameraContract

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def test_crop_without_resize_is_a_window():
    camera = CameraContract("top", (10, 12), (4, 5), crop=(2, 3, 4, 5))
    image = picture(10, 12)
    np.testing.assert_array_equal(prepare(image, camera), image[2:6, 3:8])


def test_the_model_size_is_taken_as_it_is():
    camera = CameraContract("top", (10, 12), (4, 5), crop=(2, 3, 4, 5))
    image = picture(4, 5)
    np.testing.assert_array_equal(prepare(image, camera), image)


def test_a_size_that_is_both_is_the_source():
    camera = CameraContract("top", (8, 8), (8, 8), crop=(0, 0, 4, 4), resize="bilinear")
    image = picture(8, 8)
    assert not np.array_equal(prepare(image, camera), image)


def test_read_only_pictures_and_given_buffers():
    camera = CameraContract("top", (8, 8), (4, 4), resize="area")
    image, out = picture(8, 8), np.empty((4, 4, 3), np.uint8)
    image.flags.writeable = False
    assert prepare(image, camera, out) is out
    mean = image.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(out, np.floor(mean + 0.5))


@pytest.mark.parametrize("resize", ["bilinear", "area"])
@given(source=SIZES, target=SIZES, value=st.integers(0, 255))
def test_a_flat_picture_stays_flat(resize, source, target, value):
    camera = CameraContract("c", source, target, resize=resize)
    out = prepare(np.full((*source, 3), value, np.uint8), camera)
    assert (out == value).all()


@given(source=SIZES, target=SIZES, seed=st.integers(0, 99))
def test_bilinear_is_what_torch_calls_so(source, target, seed):
    camera = CameraContract("c", source, target, resize="bilinear")
    image = picture(*source, seed)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(tensor, size=target, mode="bilinear")
    got = prepare(image, camera).astype(float)
    # Two rounded weights of 2**-11 and the final rounding.
    assert np.abs(got - expected[0].permute(1, 2, 0).numpy()).max() <= 0.5 + 255 * 2**-10


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (picture(9, 12), r"images.top: got shape \(9, 12, 3\), expected \(10, 12, 3\) or \(4, 5"),
        (picture(10, 12).astype(np.float32), "images.top: got dtype float32, expected uint8"),
        (picture(10, 12)[:, :, :2], r"images.top: got shape \(10, 12, 2\)"),
        ([[1]], "images.top: got list, expected a uint8 array"),
    ],
)
def test_other_pictures_are_refused(image, message):
    camera = CameraContract("top", (10, 12), (4, 5), crop=(2, 3, 4, 5))
    with pytest.raises(ContractMismatch, match=message):
        prepare(image, camera)
