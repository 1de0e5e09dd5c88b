"""Crop and resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from policies import image_resize
from policies.errors import ContractMismatch
from policies.image_resize import prepare
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


def resized_by_products(image, target, method):
    """What "resized" means: dense products in float64, which are exact; none where a weight would
    be negative, whose result nobody has defined."""
    one = 2**11
    sides = []
    for source, size in zip(image.shape[:2], target, strict=True):
        weights = np.zeros((size, source))
        for i in range(size):
            if method == "bilinear":
                centre = min(max((i + 0.5) * source / size - 0.5, 0.0), source - 1.0)
                low = min(int(centre), source - 1)
                weights[i, low] = 1 - (centre - low)
                if low + 1 < source:
                    weights[i, low + 1] = centre - low
            else:
                start, stop = i * source / size, (i + 1) * source / size
                weights[i] = np.diff(np.clip(np.arange(source + 1), start, stop)) / (stop - start)
        whole = np.round(weights * one)
        whole[np.arange(size), whole.argmax(axis=1)] += one - whole.sum(axis=1)
        if (whole < 0).any():
            return None
        sides.append(whole)
    tall = np.tensordot(sides[0], image.astype(np.float64), axes=(1, 0))
    both = np.tensordot(tall, sides[1], axes=(1, 1)).transpose(0, 2, 1)
    return np.floor(both / one**2 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("resize", ["bilinear", "area"])
@given(
    source=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    target=SIZES,
    crop=st.tuples(*[st.floats(0, 1)] * 4),
    seed=st.integers(0, 99),
)
@example(source=(480, 640), target=(240, 320), crop=(0, 0, 1, 1), seed=0)
@example(source=(480, 640), target=(240, 320), crop=(0.3, 0.3, 0.7, 0.9), seed=1)
@example(source=(720, 1280), target=(224, 224), crop=(0, 0, 1, 1), seed=1)
@example(source=(240, 320), target=(480, 640), crop=(0, 0, 1, 1), seed=2)
@example(source=(481, 641), target=(239, 319), crop=(0, 0, 1, 1), seed=3)
def test_every_bit_is_that_of_exact_products(resize, source, target, crop, seed):
    image = picture(*source, seed)
    if seed % 2:  # sums at their largest, and ties
        image = np.where(image < 128, 0, 255).astype(np.uint8)
    top, left = (int(side * (part - 1e-9)) for side, part in zip(source, crop[:2], strict=True))
    top, left = max(top, 0), max(left, 0)
    height, width = (
        max(1, int((source[0] - top) * crop[2])),
        max(1, int((source[1] - left) * crop[3])),
    )
    camera = CameraContract("c", source, target, crop=(top, left, height, width), resize=resize)
    expected = resized_by_products(image[top : top + height, left : left + width], target, resize)
    assume(expected is not None and source != target)
    np.testing.assert_array_equal(prepare(image, camera), expected)


@pytest.mark.parametrize("resize", ["bilinear", "area"])
def test_pictures_and_buffers_that_do_not_lie_in_one_piece(resize):
    camera = CameraContract("c", (31, 47), (13, 20), resize=resize)
    bgr = picture(31, 47)
    wide = np.zeros((26, 20, 3), np.uint8)
    out = prepare(bgr[..., ::-1], camera, wide[::2])
    expected = resized_by_products(np.ascontiguousarray(bgr[..., ::-1]), (13, 20), resize)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(wide[::2], expected)
    assert not wide[1::2].any()


@pytest.mark.parametrize("pixels", [80, 150, 1365])
def test_rounding_makes_no_weight_negative(pixels):
    """Of so many pixels, the rounded weights add up to more than one and what the largest has."""
    dark = np.zeros((1, pixels, 3), np.uint8)
    dark[:, 0] = 255
    for image in (dark, dark.transpose(1, 0, 2)):
        camera = CameraContract("c", image.shape[:2], (1, 1), resize="area")
        assert prepare(image, camera).max() <= 255 / pixels + 1
        bright = np.where(image, 0, 255).astype(np.uint8)
        assert prepare(bright, camera).min() >= 255 - 255 / pixels - 1


def test_what_warm_up_worked_out_is_not_worked_out_again():
    camera = CameraContract("c", (33, 55), (17, 21), crop=(1, 2, 30, 50), resize="area")
    image_resize.warm_up([camera])
    assert image_resize._resizer.cache_info().currsize == 1
    before = image_resize._taps.cache_info().misses
    prepare(picture(33, 55), camera)
    assert image_resize._taps.cache_info().misses == before


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
