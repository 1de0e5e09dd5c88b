"""How a session's pictures cross: as they are, brought to the model's size, or as JPEG.

Declared in the handshake and settled there. Pictures of the model's size are the same bytes
wherever they were resized (``policies.image_resize``), so they change nothing but the load. JPEG is
lossy and for slow links: its pictures share one array of a declared maximum, end to end, and only
what is used of it crosses (``transport.schema.USED``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies import jpeg
from policies.errors import ContractMismatch, ObservationError
from policies.image_resize import prepare, warm_up
from policies.types import CameraContract, MetaObs, PolicyContract
from runtime.protocol import messages
from transport.schema import USED, ArraySpec, Schema

JPEG, LENGTHS = "jpeg", "jpeg/lengths"
"""The array of all pictures, one after the other, and the length of each. In a handshake's
attributes, ``JPEG`` is camera to [height, width], in their order."""

Arrays = Mapping[str, NDArray[Any]]
Read = Callable[[Arrays], MetaObs]


class Outgoing:
    """A client's side.

    Args:
        schema: Of observations as the caller makes them (``messages.observation_schema``).
        resize: Bring pictures to the model's size.
        quality: Send them as JPEG of this quality, 1 to 100; None for pixels.

    Attributes:
        schema: Of what crosses.
        attributes: What the handshake says of it.
        description: In words.

    Raises:
        ContractMismatch: Not observations that the policy takes.
        JpegMissing: JPEG without its codec.
    """

    def __init__(
        self, schema: Schema, contract: PolicyContract, *, resize: bool, quality: int | None
    ) -> None:
        # The same check as the server's, so that the answer needs no round trip.
        messages.check_observation_schema(schema, contract)
        self._cameras = {c.name: c for c in contract.cameras}
        self._given = {c.name: _hw(schema, c) for c in contract.cameras}
        self._sent = {
            name: camera.model_hw if resize and self._shrinks(camera) else self._given[name]
            for name, camera in self._cameras.items()
        }
        self._quality = quality if self._sent else None
        self._resized = self._sent != self._given
        warm_up(c for c in contract.cameras if self._sent[c.name] != self._given[c.name])
        self.attributes: dict[str, Any] = {}
        words = ["resized by the client"] if self._resized else []
        if self._quality is not None:
            jpeg.codec()
            self.attributes[JPEG] = {name: list(hw) for name, hw in self._sent.items()}
            words.append(f"JPEG of quality {quality}")
            self.schema = _with_jpeg(schema, self._sent)
        else:
            self.schema = _with_sizes(schema, self._sent)
        self.description = ", ".join(words) or "as they are"
        self._as_they_are = not (self._resized or self.lossy)
        drawn = {} if self._as_they_are else self._given
        self._drawn = {n: np.empty((*hw, 3), np.uint8) for n, hw in drawn.items()}
        resized = self._sent if self._resized and self.lossy else {}
        self._scratch = {n: np.empty((*hw, 3), np.uint8) for n, hw in resized.items()}

    @property
    def lossy(self) -> bool:
        return self._quality is not None

    @property
    def copied(self) -> bool:
        """Whether ``write`` only copies: to resize or encode takes longer than a peer watches."""
        return self._as_they_are

    def canvas(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.uint8]]:
        """Where to render the next observation: the message's own arrays, where they fit."""
        if not self._as_they_are:
            return self._drawn
        return {name: arrays[messages.IMAGE + name] for name in self._cameras}

    def write(self, obs: MetaObs, arrays: dict[str, NDArray[Any]]) -> None:
        """Fill a message of ``schema``.

        Raises:
            ContractMismatch: Not of the kind that the schema was made from.
        """
        if self._as_they_are:
            messages.write_observation(obs, arrays)
            return
        self._check(obs)
        images = dict(obs.images)
        for name, camera in self._cameras.items():
            if self._sent[name] != self._given[name]:
                out = self._scratch[name] if self.lossy else arrays[messages.IMAGE + name]
                images[name] = prepare(obs.images[name], camera, out)
        if self.lossy:
            self._write_jpeg(images, arrays)
            images = {}
        rest = {n: a for n, a in arrays.items() if n not in (JPEG, JPEG + USED, LENGTHS)}
        messages.write_observation(dataclasses.replace(obs, images=images), rest)

    def _shrinks(self, camera: CameraContract) -> bool:
        """Whether resizing helps; of two equal sizes the server takes the source's, and crops."""
        ours, model = self._given[camera.name], camera.model_hw
        return ours == camera.source_hw != model and ours[0] * ours[1] > model[0] * model[1]

    def _check(self, obs: MetaObs) -> None:
        if obs.images.keys() != self._given.keys():
            raise ContractMismatch("cameras", f"{sorted(obs.images)}", f"{sorted(self._given)}")
        for name, hw in self._given.items():
            image, shape = obs.images[name], (*hw, 3)
            got = getattr(image, "shape", None), getattr(image, "dtype", None)
            if got != (shape, np.dtype(np.uint8)):
                raise ContractMismatch(f"images.{name}", f"{got[1]} {got[0]}", f"uint8 {shape}")

    def _write_jpeg(self, images: Mapping[str, NDArray[np.uint8]], arrays: Arrays) -> None:
        end, quality = 0, self._quality or jpeg.DEFAULT_QUALITY
        for number, name in enumerate(self._sent):
            data = np.frombuffer(jpeg.encode(images[name], quality), np.uint8)
            arrays[JPEG][end : end + data.size] = data
            arrays[LENGTHS][number] = data.size
            end += data.size
        arrays[JPEG + USED][()] = end


def reader(schema: Schema, attributes: Mapping[str, Any], contract: PolicyContract) -> Read:
    """What reads a session's messages, for a server.

    Args:
        schema, attributes: As the client's handshake said them; not trusted.

    Raises:
        ContractMismatch: Not what the policy needs, or not what this server can read.
    """
    if JPEG not in attributes:
        messages.check_observation_schema(schema, contract)
        return messages.read_observation
    sizes = _declared(attributes[JPEG], contract)
    specs = {n: s for n, s in schema.specs.items() if n not in (JPEG, JPEG + USED, LENGTHS)}
    pictures = [ArraySpec(messages.IMAGE + n, "uint8", (*hw, 3)) for n, hw in sizes.items()]
    plain = Schema((*pictures, *specs.values()))
    messages.check_observation_schema(plain, contract)
    if schema != (expected := _with_jpeg(plain, sizes)):
        raise ContractMismatch("jpeg", f"{schema}", f"{expected}")
    try:
        jpeg.codec()
    except jpeg.JpegMissing as error:
        raise ContractMismatch(
            "jpeg", "pictures as JPEG", f"pixels: at the server, {error}"
        ) from error
    return _JpegReader(sizes)


class _JpegReader:
    """Decodes into pictures of its own, which the next message overwrites."""

    def __init__(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        self._pictures = {name: np.empty((*hw, 3), np.uint8) for name, hw in sizes.items()}
        self._views = {name: picture.view() for name, picture in self._pictures.items()}
        for view in self._views.values():
            view.flags.writeable = False

    def __call__(self, arrays: Arrays) -> MetaObs:
        """Raises ``ObservationError`` for pictures that are not what was declared."""
        lengths = arrays[LENGTHS].tolist()
        used = int(arrays[JPEG + USED])
        if min(lengths) < 1 or sum(lengths) != used or used > arrays[JPEG].size:
            raise ObservationError(f"JPEG: got lengths {lengths} of {used} bytes in all")
        start = 0
        for length, (name, picture) in zip(lengths, self._pictures.items(), strict=True):
            try:
                jpeg.decode(arrays[JPEG][start : start + length], picture)
            except ObservationError as error:
                raise ObservationError(f"images.{name}: {error}") from error
            start += length
        obs = messages.read_observation(
            {n: a for n, a in arrays.items() if n not in (JPEG, JPEG + USED, LENGTHS)}
        )
        obs.images = dict(self._views)
        return obs


def _declared(said: object, contract: PolicyContract) -> dict[str, tuple[int, int]]:
    """The size of every camera's pictures, as a client declared them."""
    names = contract.camera_names
    if not isinstance(said, dict) or not names or tuple(said) != names:
        raise ContractMismatch("jpeg", f"{said!r:.200}", f"a size for each of {names}, in order")
    sizes = {}
    for camera in contract.cameras:
        hw = said[camera.name]
        if not isinstance(hw, list) or tuple(hw) not in camera.accepted_hw:
            raise ContractMismatch(
                f"jpeg.{camera.name}", f"{hw!r:.80}", " or ".join(map(str, camera.accepted_hw))
            )
        sizes[camera.name] = camera.accepted_hw[camera.accepted_hw.index(tuple(hw))]
    return sizes


def _hw(schema: Schema, camera: CameraContract) -> tuple[int, int]:
    height, width, _ = schema.specs[messages.IMAGE + camera.name].shape
    return height, width


def _with_sizes(schema: Schema, sizes: Mapping[str, tuple[int, int]]) -> Schema:
    """``schema`` with pictures of these sizes."""
    pictures = {messages.IMAGE + name: (*hw, 3) for name, hw in sizes.items()}
    return Schema(
        tuple(
            ArraySpec(spec.name, spec.dtype, pictures.get(spec.name, spec.shape))
            for spec in schema.specs.values()
        )
    )


def _with_jpeg(schema: Schema, sizes: Mapping[str, tuple[int, int]]) -> Schema:
    """``schema`` with these pictures as JPEG: at most so many bytes, at the end."""
    pixels = {messages.IMAGE + name for name in sizes}
    rest = (spec for name, spec in schema.specs.items() if name not in pixels)
    return Schema(
        (
            *rest,
            ArraySpec(LENGTHS, "int64", (len(sizes),)),
            ArraySpec(JPEG + USED, "int64", ()),
            ArraySpec(JPEG, "uint8", (sum(map(jpeg.max_bytes, sizes.values())),)),
        )
    )
