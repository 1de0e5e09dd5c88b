"""Pictures out of ROS messages, against pixels that are known without their decoder."""

from __future__ import annotations

import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robots import ros_images
from robots.errors import ConfigError, ContractViolated
from robots.factory import make_robot
from robots.ros_compressed_images import decode_compressed_colour, decode_compressed_depth
from robots.ros_images import COLOURS, assumption, decode_colour, message_type

simplejpeg = pytest.importorskip("simplejpeg")
pytest.importorskip("cv2")

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)
QUAD = np.array([[RED, GREEN], [BLUE, (1, 2, 3)]], np.uint8)
PACKED = {
    "rgb8": "ff0000 00ff00 0000ff 010203",
    "bgr8": "0000ff 00ff00 ff0000 030201",
    "8UC3": "0000ff 00ff00 ff0000 030201",
    "rgba8": "ff000011 00ff0022 0000ff33 01020344",
    "bgra8": "0000ff11 00ff0022 ff000033 03020144",
    "8UC4": "0000ff11 00ff0022 ff000033 03020144",
}
BARS = {
    (235, 128, 128): (255, 255, 255),
    (210, 16, 146): (255, 255, 0),
    (170, 166, 16): (0, 255, 255),
    (145, 54, 34): GREEN,
    (106, 202, 222): (255, 0, 255),
    (81, 90, 240): RED,
    (41, 240, 110): BLUE,
    (16, 128, 128): (0, 0, 0),
}
"""Y, Cb, Cr of full colours: ITU-R BT.601-7, equations of 2.5.1 and the 8-bit levels of 2.5.3."""
YUYV, UYVY = ("yuv422_yuy2", "yuyv", "YUYV"), ("yuv422", "uyvy", "UYVY")


def image(data: bytes, hw: tuple[int, int], encoding: str, *, pad: int = 0, big: int = 0):
    """A ``sensor_msgs/Image`` as rospy delivers it; each row followed by ``pad`` bytes of noise."""
    rows = np.frombuffer(data, np.uint8).reshape(hw[0], -1)
    padded = np.concatenate([rows, np.full((hw[0], pad), 7, np.uint8)], axis=1)
    return SimpleNamespace(
        height=hw[0], width=hw[1], encoding=encoding, is_bigendian=big, step=padded.shape[1],
        data=padded.tobytes(),
    )  # fmt: skip


@pytest.mark.parametrize("pad", [0, 1, 13])
@pytest.mark.parametrize("big", [0, 1])
@pytest.mark.parametrize("encoding", PACKED)
def test_channels_are_put_in_order(encoding: str, pad: int, big: int) -> None:
    """Bytes have no order among themselves: the flag says nothing here."""
    message = image(bytes.fromhex(PACKED[encoding]), (2, 2), encoding, pad=pad, big=big)
    got = decode_colour(message, (2, 2))
    np.testing.assert_array_equal(got, QUAD)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_grey_is_three_times_the_same(encoding: str, pad: int) -> None:
    got = decode_colour(image(b"\x00\x80\xff\x01\x02\x03", (2, 3), encoding, pad=pad), (2, 3))
    np.testing.assert_array_equal(got[..., 0], [[0, 128, 255], [1, 2, 3]])
    assert (got == got[..., :1]).all()
    assert got.flags.c_contiguous


@pytest.mark.parametrize("pad", [0, 2, 5])
@pytest.mark.parametrize("encoding", [*YUYV, *UYVY])
def test_colour_bars_in_four_two_two(encoding: str, pad: int) -> None:
    first = 0 if encoding in YUYV else 1  # where the luma is, of two bytes
    bars = np.zeros((2, len(BARS), 2, 2), np.uint8)  # two pixels of each
    for index, (y, cb, cr) in enumerate(BARS):
        bars[:, index, :, first] = y
        bars[:, index, :, 1 - first] = cb, cr
    hw = (2, 2 * len(BARS))
    got = decode_colour(image(bars.tobytes(), hw, encoding, pad=pad), hw)
    expected = np.tile(np.repeat(np.array(list(BARS.values())), 2, axis=0), (2, 1, 1))
    assert np.abs(got.astype(int) - expected).max() <= 1  # the levels are rounded


def bt601(y: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> np.ndarray:
    """ITU-R BT.601-7, 2.5: luma 16 to 235 and colour differences 16 to 240, solved for R, G, B."""
    kr, kg, kb = 0.299, 0.587, 0.114
    luma = (np.maximum(y.astype(float), 16) - 16) / 219
    blue, red = ((c.astype(float) - 128) / 112 for c in (cb, cr))
    r, b = luma + (1 - kr) * red, luma + (1 - kb) * blue
    g = (luma - kr * r - kb * b) / kg
    return np.clip(255 * np.stack([r, g, b], -1), 0, 255)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32), st.sampled_from(YUYV + UYVY))
def test_four_two_two_is_the_formula(height: int, pairs: int, seed: int, encoding: str) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (height, pairs, 2, 2), np.uint8)
    luma, chroma = (
        (data[..., 0], data[..., 1]) if encoding in YUYV else (data[..., 1], data[..., 0])
    )
    cb, cr = (np.repeat(chroma[:, :, i], 2, axis=1) for i in (0, 1))
    expected = bt601(luma.reshape(height, -1), cb, cr)
    hw = (height, 2 * pairs)
    got = decode_colour(image(data.tobytes(), hw, encoding), hw)
    assert np.abs(got - expected).max() <= 1.5  # OpenCV's whole numbers


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, (200, 100, 50), GREY])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_flat_colour_through_each_bayer_pattern(pattern: str, colour) -> None:
    tile = np.array([colour["rgb".index(letter)] for letter in pattern], np.uint8).reshape(2, 2)
    message = image(np.tile(tile, (4, 5)).tobytes(), (8, 10), f"bayer_{pattern}8", pad=3)
    assert (decode_colour(message, (8, 10)) == colour).all()


@pytest.mark.parametrize(
    ("encoding", "hw", "message"),
    [
        *[(e, (2, 3), rf"got width 3 of {e}, expected an even one") for e in (*YUYV, *UYVY)],
        ("bayer_rggb8", (2, 4), r"got \(height, width\) \(2, 4\) of bayer_rggb8, expected 3 or mo"),
        ("nv12", (2, 2), r"got encoding 'nv12', expected one of \['rgb8', .*'yuyv'.*'bayer_grbg8'"),
        ("mono16", (2, 2), "got encoding 'mono16', expected one of"),
        ("bayer_rggb16", (4, 4), "got encoding 'bayer_rggb16', expected one of"),
        ("", (2, 2), "got encoding '', expected one of"),
    ],
)
def test_an_undecodable_image_is_reported_in_one_line(encoding: str, hw, message: str) -> None:
    with pytest.raises(ContractViolated, match=message) as error:
        decode_colour(image(bytes(hw[0] * hw[1] * 5), hw, encoding), hw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("encoding", "needed"), [("bgra8", 16), ("yuyv", 8), ("bayer_gbrg8", 4)])
def test_data_that_do_not_fit_are_refused(encoding: str, needed: int) -> None:
    message = image(bytes(4 * needed), (4, 4), encoding)
    message.data = message.data[:-1]
    expected = (
        rf"got {4 * needed - 1} bytes in rows of {needed} for 4 x 4 {encoding}, expected 4 ro"
    )
    with pytest.raises(ContractViolated, match=expected):
        decode_colour(message, (4, 4))


def test_every_encoding_that_is_listed_is_decoded() -> None:
    for encoding in COLOURS:
        assert decode_colour(image(bytes(4 * 4 * 4), (4, 4), encoding), (4, 4)).shape == (4, 4, 3)


@pytest.mark.parametrize("encoding", COLOURS)
def test_another_size_is_refused(encoding: str) -> None:
    with pytest.raises(
        ContractViolated, match=r"got \(height, width\) \(4, 6\), expected \(6, 4\)"
    ):
        decode_colour(image(bytes(4 * 6 * 4), (4, 6), encoding), (6, 4))


def test_the_configuration_outranks_the_message() -> None:
    message = image(bytes.fromhex(PACKED["rgb8"]), (2, 2), "8UC3")
    np.testing.assert_array_equal(decode_colour(message, (2, 2), "rgb8"), QUAD)
    assert "'8UC3' does not name the colours: taken for blue, green, red" in assumption(message)
    assert assumption(image(bytes(12), (2, 2), "bgr8")) == ""
    # A third of each row is no picture, though the rest could be padding.
    with pytest.raises(
        ContractViolated, match=r"'8UC3', 3 bytes per pixel, expected 1, for the co"
    ):
        decode_colour(message, (2, 2), "mono8")
    yuyv = image(bytes((235, 128, 235, 128)) * 2, (2, 2), "8UC2", pad=3)
    assert (decode_colour(yuyv, (2, 2), "yuyv") == 255).all()
    robot = make_robot("agilex_aloha", {"cameras": "{top: {camera: front, encoding: rgb8}}"})
    assert robot.config.cameras["top"].encoding == "rgb8"
    with pytest.raises(ConfigError, match=r"cameras.top.*encoding: got 'rgb9', expected one of \["):
        make_robot("agilex_aloha", {"cameras": "{top: {camera: front, encoding: rgb9}}"})


@pytest.mark.parametrize(
    ("sent", "given", "configured"),
    [("rgb16", 6, "rgb8"), ("rgba16", 8, "bgra8"), ("bayer_rggb16", 2, "bayer_rggb8"),
     ("mono16", 2, "mono8"), ("32FC1", 4, "rgb8"), ("8UC2", 2, "mono8"), ("", 6, "rgb8")],
)  # fmt: skip
def test_wider_pixels_than_configured_are_refused(sent: str, given: int, configured: str) -> None:
    """The second half of each row would pass for padding."""
    message = image(bytes(4 * 4 * given), (4, 4), sent)
    said = rf"got encoding '{sent}'.* for the configured '{configured}'"
    with pytest.raises(ContractViolated, match=said):
        decode_colour(message, (4, 4), configured)


@pytest.mark.parametrize(
    ("topic", "published", "expected"),
    [
        ("/cam/image_raw", None, "Image"),
        ("/cam/image_raw/compressed", None, "CompressedImage"),
        ("/cam/depth/image_raw/compressedDepth", None, "CompressedImage"),
        ("/cam/jpeg", "sensor_msgs/CompressedImage", "CompressedImage"),
        ("/cam/compressed", "sensor_msgs/Image", "Image"),
    ],
)
def test_the_type_of_a_topic(topic: str, published: str | None, expected: str) -> None:
    assert message_type(topic, published) == expected


@pytest.mark.parametrize("published", ["theora_image_transport/Packet", "mine/Image"])
def test_a_topic_that_carries_no_pictures(published: str) -> None:
    with pytest.raises(
        ContractViolated, match=rf"/cam/x: got messages of type {published}, expect"
    ):
        message_type("/cam/x", published)


# What is compressed. PNG as its specification says, so that nothing here decodes its own writing.


def png(array: np.ndarray) -> bytes:
    """(H, W, C) uint8 or uint16: RGB and RGBA, or grey (W3C PNG, 11.2)."""
    height, width, channels = array.shape
    colour = {1: 0, 3: 2, 4: 6}[channels]
    rows = array.astype(array.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # no filter

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8 * array.itemsize, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes())))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def compressed(data: bytes, said: str) -> SimpleNamespace:
    return SimpleNamespace(data=data, format=said)


BLOCKS = np.kron(QUAD, np.ones((16, 16, 1), np.uint8))
ALPHA = np.concatenate([QUAD, np.full((2, 2, 1), 5, np.uint8)], axis=2)
SHADES = np.array([[[3], [200]], [[0], [255]]], np.uint8)
JPEG = simplejpeg.encode_jpeg(BLOCKS, quality=100, colorsubsampling="444")
GREY_JPEG = simplejpeg.encode_jpeg(
    np.repeat(np.repeat(SHADES, 16, 0), 16, 1), quality=100, colorspace="GRAY"
)


@pytest.mark.parametrize(
    "said",
    ["rgb8; png compressed bgr8", "bgr8; png compressed bgr8", "bgra8; png compressed", "png", "",
     "8UC3; png compressed bgr8"],
)  # fmt: skip
@pytest.mark.parametrize("sent", [QUAD, ALPHA], ids=["rgb", "rgba"])
def test_png(said: str, sent: np.ndarray) -> None:
    got = decode_compressed_colour(compressed(png(sent), said), (2, 2))
    np.testing.assert_array_equal(got, QUAD)
    assert got.flags.c_contiguous


@pytest.mark.parametrize(
    "said",
    ["rgb8; jpeg compressed bgr8", "bgr8; jpeg compressed bgr8", "jpeg", "jpg", "", "bgr8",
     "rgba8; jpeg compressed bgr8", "yuv422; jpeg compressed bgr8"],
)  # fmt: skip
def test_jpeg(said: str) -> None:
    got = decode_compressed_colour(compressed(JPEG, said), (32, 32))
    assert np.abs(got.astype(int) - BLOCKS).max() <= 2
    assert got.flags.c_contiguous


def test_jpeg_is_what_cv_bridge_makes_of_it() -> None:
    """The bytes of recordings that were made through it, chroma of half the resolution included."""
    import cv2

    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    data = simplejpeg.encode_jpeg(noise, quality=80, colorsubsampling="420")
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    got = decode_compressed_colour(compressed(data, "rgb8; jpeg compressed bgr8"), (37, 53))
    np.testing.assert_array_equal(got, theirs[..., ::-1])


@pytest.mark.parametrize("said", ["mono8; jpeg compressed ", "jpeg", "mono8; png compressed", ""])
def test_compressed_grey(said: str) -> None:
    if "png" in said:
        got = decode_compressed_colour(compressed(png(SHADES), said), (2, 2))
        np.testing.assert_array_equal(got, np.repeat(SHADES, 3, 2))
    else:
        got = decode_compressed_colour(compressed(GREY_JPEG, said), (32, 32))
        assert got[0, 0].tolist() == [3, 3, 3]
        assert got[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("said", "encoding", "exchanged"),
    [
        ("rgb8; jpeg compressed rgb8", "", True),  # by image_transport's rule
        ("bgr8; png compressed rgb8", "", True),
        ("rgb8; jpeg compressed rgb8", "rgb8", False),  # the configuration outranks it
        ("jpeg", "bgr8", True),
        ("jpeg", "rgb8", False),
    ],
)
def test_colours_that_changed_places_before_compression(said, encoding, exchanged) -> None:
    for data, scale in ((png(QUAD), 1), (JPEG, 16)):
        hw = (2 * scale, 2 * scale)
        got = decode_compressed_colour(compressed(data, said), hw, encoding)[::scale, ::scale]
        expected = QUAD[..., ::-1] if exchanged else QUAD
        assert np.abs(got.astype(int) - expected).max() <= 2


DEEP = np.array([[[0], [1]], [[1000], [65535]]], np.uint16)
QUANTIZED = struct.pack("<iff", 0, 9900.0, -98.0)
"""A and B of a 32FC1 picture with a quantization of 99 and a maximum of 100 m."""


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png(DEEP), "16UC1; png compressed "),
        (png(DEEP), "mono16; png compressed "),
        (bytes(12) + png(DEEP), "16UC1; compressedDepth png"),
        (bytes(12) + png(DEEP), "16UC1; compressedDepth"),
        (bytes(12) + png(DEEP), "16UC1"),
    ],
)
def test_compressed_depth_in_millimetres(data: bytes, said: str) -> None:
    got = decode_compressed_depth(compressed(data, said))
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, DEEP[..., 0])


def test_compressed_depth_in_metres() -> None:
    """A / (value − B), which is how image_transport wrote it; 0 stands for none."""
    got = decode_compressed_depth(compressed(QUANTIZED + png(DEEP), "32FC1; compressedDepth png"))
    assert got.dtype == np.float32
    assert np.isnan(got[0, 0])
    np.testing.assert_allclose(
        [got[0, 1], got[1, 0], got[1, 1]], [9900 / 99, 9900 / 1098, 9900 / 65633], rtol=1e-6
    )


TRUNCATED = r"got a JPEG that does not decode \("
BIG = png(np.zeros((2, 2, 3), np.uint16))


@pytest.mark.parametrize(
    ("data", "said", "hw", "message"),
    [
        (JPEG, "jpeg", (32, 33), r"got \(height, width\) \(32, 32\), expected \(32, 33\), as conf"),
        (png(QUAD), "png", (1, 2), r"got \(height, width\) \(2, 2\), expected \(1, 2\), as conf"),
        (JPEG[: len(JPEG) // 2], "jpeg", (32, 32), TRUNCATED),
        (JPEG[:-2], "jpeg", (32, 32), TRUNCATED),
        (JPEG[:9], "jpeg", (32, 32), TRUNCATED),
        (png(QUAD)[:-20], "png", (2, 2), r"got a PNG of \d+ bytes that does not decode"),
        (png(QUAD)[:8], "png", (2, 2), r"got a PNG of 8 bytes that does not decode"),
        (BIG, "rgb16; png compressed bgr16", (2, 2), r"got a PNG of uint16 .*, expected uint8"),
        (b"\0\0\0\1g", "h264", (2, 2), r"got format 'h264', 5 bytes that begin with 00 00 00 01"),
        (b"", "jpeg", (2, 2), r"got format 'jpeg', 0 bytes that begin with none, expected JPE"),
        (bytes(12) + png(DEEP), "16UC1; compressedDepth png", (2, 2), r"expected JPEG or PNG"),
        (GREY_JPEG, "bayer_rggb8; jpeg compressed ", (32, 32),
         r"got a picture without colours for 'bayer_rggb8; jpeg compressed ', expected one with"),
    ],
)  # fmt: skip
def test_an_invalid_compressed_image_is_reported_in_one_line(
    data, said: str, hw, message: str
) -> None:
    with pytest.raises(ContractViolated, match=message) as error:
        decode_compressed_colour(compressed(data, said), hw)
    assert "\n" not in str(error.value)


def test_an_encoding_that_compressed_pictures_do_not_have() -> None:
    with pytest.raises(
        ContractViolated, match=r"got encoding 'yuyv' for a compressed pic.*\['rgb8'"
    ):
        decode_compressed_colour(compressed(JPEG, "jpeg"), (32, 32), "yuyv")


@pytest.mark.parametrize(
    ("data", "said", "message"),
    [
        (JPEG, "16UC1; jpeg compressed ", r"expected PNG, the only one here that has 16 bits"),
        (
            bytes(12) + b"\2\0\0\0",
            "16UC1; compressedDepth rvl",
            r"'16UC1; compressedDepth rvl', 4 b",
        ),
        (bytes(5), "16UC1; compressedDepth png", r"0 bytes that begin with none, expected PNG"),
        (
            png(QUAD),
            "png",
            r"got a PNG of uint8 \(2, 2, 3\) \('png'\), expected uint16 \(H, W, 1\)",
        ),
        (
            png(DEEP),
            "rgb8; png compressed bgr8",
            r"got format 'rgb8; .*, expected one of \['16UC1'",
        ),
        (bytes(12) + png(DEEP), "32FC1; compressedDepth png", r"got A 0 and B 0 .*expected A > 0"),
        (png(DEEP), "32FC1; png compressed", r"got A 0 and B 0 .*expected A > 0"),
    ],
)
def test_an_invalid_compressed_depth_is_reported_in_one_line(
    data: bytes, said: str, message: str
) -> None:
    with pytest.raises(ContractViolated, match=message) as error:
        decode_compressed_depth(compressed(data, said))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["cv2", "simplejpeg"])
def test_a_missing_library_is_named(module: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    ros_images.import_opencv.cache_clear()
    yuyv = image(bytes(8), (2, 2), "yuyv")
    if module == "cv2":
        needs = "needs OpenCV.*pip install opencv-python-headless"
        with pytest.raises(ContractViolated, match=f"got encoding 'yuyv', which {needs}"):
            decode_colour(yuyv, (2, 2))
        with pytest.raises(ContractViolated, match=f"got a PNG, which {needs}"):
            decode_compressed_colour(compressed(png(QUAD), "png"), (2, 2))
    else:
        assert decode_colour(yuyv, (2, 2)).shape == (2, 2, 3)
        with pytest.raises(ContractViolated, match=r"got a JPEG: .*simplejpeg.*pip install"):
            decode_compressed_colour(compressed(JPEG, "jpeg"), (32, 32))
    for encoding, data in PACKED.items():
        decode_colour(image(bytes.fromhex(data), (2, 2), encoding), (2, 2))
