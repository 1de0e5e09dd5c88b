"""Targets that read pictures: what a handshake declares, and what a message then holds."""

from __future__ import annotations

import contextlib
import json

import numpy as np

from policies import jpeg
from policies.errors import ContractMismatch, ObservationError
from runtime.protocol import image_codec, messages
from tests.fuzz import samples
from tests.fuzz.feed import Feed, reached
from tests.fuzz.parsers import body_of
from transport.errors import ProtocolError, SchemaMismatch
from transport.schema import USED, Schema

GUARD = 64
_NEAR = 0xA5


def jpeg_data(data: bytes) -> None:
    """A JPEG of a camera's size: nothing larger may be decoded, nothing beside it written."""
    feed = Feed(data)
    kind = feed.byte()
    camera = samples.CONTRACT.cameras[kind & 1]
    raw = feed.rest() if kind & 2 else feed.bytes_near(samples.jpegs()[kind & 1])
    if kind & 4:
        raw = _resized(feed, raw)
    height, width = camera.source_hw
    room = np.full(height * width * 3 + 2 * GUARD, _NEAR, np.uint8)
    out = room[GUARD:-GUARD].reshape(height, width, 3)
    try:
        jpeg.decode(np.frombuffer(raw, np.uint8), out)
    except ObservationError as error:
        if "does not decode" not in str(error):
            assert (out == _NEAR).all(), "decoded before it was checked"
        else:
            reached["given to the decoder"] += 1
    else:
        reached["decoded"] += 1
        size = jpeg.codec().decode_jpeg_header(raw)[:2]
        assert size == (height, width), size
    assert (room[:GUARD] == _NEAR).all() and (room[-GUARD:] == _NEAR).all()


def _resized(feed: Feed, raw: bytes) -> bytes:
    """With another byte or two in the frame's header: precision, height, width or components."""
    at = raw.find(bytes((0xFF, 0xC0))) + 4 + (feed.byte() & 7)
    said = feed.take(1 + (feed.byte() & 1))
    return raw[:at] + said + raw[at + len(said) :]


def pictures(data: bytes) -> None:
    """A session's schema and attributes, then a message of it."""
    feed = Feed(data)
    kind = feed.byte()
    quality = 80 if kind & 1 else None
    valid = samples.hello(quality)
    text = feed.json(feed.vary(json.loads(valid["schema"]))) if kind & 2 else valid["schema"]
    attributes = valid["attributes"]
    if kind & 4:
        attributes = body_of(feed, attributes)
    try:
        schema = Schema.from_json(text)
        if attributes is None:
            return
        read = image_codec.observation_reader(schema, attributes, samples.CONTRACT)
    except (ProtocolError, SchemaMismatch, ContractMismatch):
        return
    reached["readers"] += 1
    assert schema.nbytes < 1 << 20, "a message far longer than an observation"
    arrays = schema.views(memoryview(bytearray(schema.nbytes)), writable=True)
    lossy = image_codec.JPEG in schema.specs
    if lossy:
        _fill(feed, arrays)
    else:
        assert not (quality and not kind & 6)
    for name in ("state", "timestep", "t_capture_ns", "raw_lang"):
        if name in arrays:
            flat = arrays[name].reshape(-1).view(np.uint8)
            said = feed.take(min(feed.byte(), flat.size))
            flat[: len(said)] = np.frombuffer(said, np.uint8)
    with contextlib.suppress(ObservationError):
        obs = read(arrays)
        reached["jpegs" if lossy else "pixels"] += 1
        for camera in samples.CONTRACT.cameras:
            picture = obs.images[camera.name]
            assert picture.dtype == np.uint8 and picture.shape[:2] in camera.accepted_hw
            assert not (lossy and picture.flags.writeable)
        assert len(obs.raw_lang.encode()) <= 3 * messages.MAX_LANG_BYTES
        assert type(obs.timestep) is type(obs.t_capture_ns) is int


def _fill(feed: Feed, arrays: image_codec.Arrays) -> None:
    """Both pictures of the samples, changed, with lengths that may lie."""
    datas = [feed.bytes_near(one) for one in samples.jpegs()]
    joined = np.frombuffer(b"".join(datas), np.uint8)[: arrays[image_codec.JPEG].size]
    arrays[image_codec.JPEG][: joined.size] = joined
    arrays[image_codec.LENGTHS][:] = [len(one) for one in datas]
    arrays[image_codec.JPEG + USED][()] = sum(len(one) for one in datas)
    lies = feed.byte()
    if lies & 1:
        arrays[image_codec.LENGTHS][lies >> 1 & 1] = feed.word()
    if lies & 4:
        arrays[image_codec.JPEG + USED][()] = feed.word()
