"""Image encoding of a session: unchanged, resized to the model's size, or JPEG.

The handshake fixes the encoding. Resizing gives the same bytes on either side
(``policies.image_resize``), so it changes only who does the work. JPEG is lossy and meant for slow
links: all images of an observation are concatenated in one array of a declared maximum size, and
only the used part of it is sent (``transport.schema.USED``).
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
"""Names of two arrays: all JPEG images concatenated (uint8), and the length of each (int64).

In a handshake's attributes, ``JPEG`` maps each camera to [height, width], in the same order. An
observation of several ticks has the images of one camera one after another, the oldest first.
"""

Arrays = Mapping[str, NDArray[Any]]
ObservationReader = Callable[[Arrays], MetaObs]


class ObservationWriter:
    """Writes observations into a client's messages, with their images encoded.

    Args:
        schema: The layout of the caller's observations (``messages.observation_schema``).
        resize: Resize images to the model's size.
        quality: Send images as JPEG of this quality, 1 to 100; None for pixels.

    Attributes:
        schema: The layout of the messages.
        attributes: The handshake's attributes that describe the encoding.
        description: The encoding in words.

    Raises:
        ContractMismatch: The policy does not take such observations.
        JpegMissing: JPEG is asked for and its codec is not installed.
    """

    def __init__(
        self, schema: Schema, contract: PolicyContract, *, resize: bool, quality: int | None
    ) -> None:
        # The server checks the same; here the error needs no round trip.
        messages.check_observation_schema(schema, contract)
        self._axes = contract.obs_axes
        self._cameras = {c.name: c for c in contract.cameras}
        self._caller_hw = {c.name: _hw(schema, c) for c in contract.cameras}
        self._sent_hw = {
            name: camera.model_hw if resize and self._shrinks(camera) else self._caller_hw[name]
            for name, camera in self._cameras.items()
        }
        self._quality = quality if self._sent_hw else None
        self._resized = self._sent_hw != self._caller_hw
        warm_up(c for c in contract.cameras if self._sent_hw[c.name] != self._caller_hw[c.name])
        self.attributes: dict[str, Any] = {}
        words = ["resized by the client"] if self._resized else []
        if self._quality is not None:
            jpeg.codec()
            self.attributes[JPEG] = {name: list(hw) for name, hw in self._sent_hw.items()}
            words.append(f"JPEG of quality {quality}")
            self.schema = _with_jpeg(schema, self._sent_hw, contract.n_obs_steps)
        else:
            self.schema = _with_sizes(schema, self._sent_hw)
        self.description = ", ".join(words) or "as they are"
        self._unchanged = not (self._resized or self.lossy)
        rendered = {} if self._unchanged else self._caller_hw
        self._render_arrays = self._empty(rendered)
        resized = self._sent_hw if self._resized and self.lossy else {}
        self._scratch = self._empty(resized)

    @property
    def lossy(self) -> bool:
        """Whether images are sent as JPEG."""
        return self._quality is not None

    @property
    def copies_only(self) -> bool:
        """Whether ``write`` only copies. Resizing and encoding take longer than a peer spins."""
        return self._unchanged

    def render_targets(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.uint8]]:
        """Arrays by camera to render the next observation into, uint8 (height, width, 3), with a
        leading axis n_obs_steps where that is above 1.

        They are views of ``arrays`` where images are sent unchanged.
        """
        if not self._unchanged:
            return self._render_arrays
        return {name: arrays[messages.IMAGE + name] for name in self._cameras}

    def write(self, obs: MetaObs, arrays: dict[str, NDArray[Any]]) -> None:
        """Write ``obs`` into the arrays of a message of ``schema``.

        Raises:
            ContractMismatch: The cameras, shapes or dtypes differ from those of the schema.
        """
        if self._unchanged:
            messages.write_observation(obs, arrays)
            return
        self._check(obs)
        images = dict(obs.images)
        for name, camera in self._cameras.items():
            if self._sent_hw[name] != self._caller_hw[name]:
                out = self._scratch[name] if self.lossy else arrays[messages.IMAGE + name]
                for frame, target in zip(_frames(obs.images[name]), _frames(out), strict=True):
                    prepare(frame, camera, target)
                images[name] = out
        if self.lossy:
            self._write_jpeg(images, arrays)
            images = {}
        rest = {n: a for n, a in arrays.items() if n not in (JPEG, JPEG + USED, LENGTHS)}
        messages.write_observation(dataclasses.replace(obs, images=images), rest)

    def _empty(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, NDArray[np.uint8]]:
        return {name: np.empty((*self._axes, *hw, 3), np.uint8) for name, hw in sizes.items()}

    def _shrinks(self, camera: CameraContract) -> bool:
        """Whether resizing makes the image smaller.

        Where the source's and the model's size are equal, the server takes an image for the
        source's and crops it.
        """
        hw, model = self._caller_hw[camera.name], camera.model_hw
        return hw == camera.source_hw != model and hw[0] * hw[1] > model[0] * model[1]

    def _check(self, obs: MetaObs) -> None:
        if obs.images.keys() != self._caller_hw.keys():
            raise ContractMismatch("cameras", f"{sorted(obs.images)}", f"{sorted(self._caller_hw)}")
        for name, hw in self._caller_hw.items():
            image, shape = obs.images[name], (*self._axes, *hw, 3)
            got = getattr(image, "shape", None), getattr(image, "dtype", None)
            if got != (shape, np.dtype(np.uint8)):
                raise ContractMismatch(f"images.{name}", f"{got[1]} {got[0]}", f"uint8 {shape}")

    def _write_jpeg(self, images: Mapping[str, NDArray[np.uint8]], arrays: Arrays) -> None:
        end, quality = 0, self._quality or jpeg.DEFAULT_QUALITY
        frames = (frame for name in self._sent_hw for frame in _frames(images[name]))
        for number, frame in enumerate(frames):
            data = np.frombuffer(jpeg.encode(frame, quality), np.uint8)
            arrays[JPEG][end : end + data.size] = data
            arrays[LENGTHS][number] = data.size
            end += data.size
        arrays[JPEG + USED][()] = end


def observation_reader(
    schema: Schema, attributes: Mapping[str, Any], contract: PolicyContract
) -> ObservationReader:
    """Make the function that reads a session's observations at a server.

    Args:
        schema, attributes: From the client's handshake; not trusted.

    Raises:
        ContractMismatch: The policy needs something else, or this server has no JPEG codec.
    """
    if JPEG not in attributes:
        messages.check_observation_schema(schema, contract)
        return messages.read_observation
    sizes = _declared_sizes(attributes[JPEG], contract)
    specs = {n: s for n, s in schema.specs.items() if n not in (JPEG, JPEG + USED, LENGTHS)}
    shapes = {name: (*contract.obs_axes, *hw, 3) for name, hw in sizes.items()}
    images = [ArraySpec(messages.IMAGE + name, "uint8", shape) for name, shape in shapes.items()]
    plain = Schema((*images, *specs.values()))
    messages.check_observation_schema(plain, contract)
    if schema != (expected := _with_jpeg(plain, sizes, contract.n_obs_steps)):
        raise ContractMismatch("jpeg", f"{schema}", f"{expected}")
    try:
        jpeg.codec()
    except jpeg.JpegMissing as error:
        raise ContractMismatch(
            "jpeg", "images as JPEG", f"pixels: at the server, {error}"
        ) from error
    return _JpegReader(shapes)


class _JpegReader:
    """Decodes JPEG images into its own arrays, which the next message overwrites."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._images = {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}
        self._frames = [(n, frame) for n, image in self._images.items() for frame in _frames(image)]
        self._views = {name: image.view() for name, image in self._images.items()}
        for view in self._views.values():
            view.flags.writeable = False

    def __call__(self, arrays: Arrays) -> MetaObs:
        """Read one observation.

        Raises:
            ObservationError: The lengths or an image are not as declared.
        """
        lengths = arrays[LENGTHS].tolist()
        used = int(arrays[JPEG + USED])
        if min(lengths) < 1 or sum(lengths) != used or used > arrays[JPEG].size:
            raise ObservationError(f"JPEG: got lengths {lengths} of {used} bytes in all")
        start = 0
        for length, (name, frame) in zip(lengths, self._frames, strict=True):
            try:
                jpeg.decode(arrays[JPEG][start : start + length], frame)
            except ObservationError as error:
                raise ObservationError(f"images.{name}: {error}") from error
            start += length
        obs = messages.read_observation(
            {n: a for n, a in arrays.items() if n not in (JPEG, JPEG + USED, LENGTHS)}
        )
        obs.images = dict(self._views)
        return obs


def _declared_sizes(raw: object, contract: PolicyContract) -> dict[str, tuple[int, int]]:
    """(height, width) of every camera's images, from a client's attributes; not trusted."""
    names = contract.camera_names
    if not isinstance(raw, dict) or not names or tuple(raw) != names:
        raise ContractMismatch("jpeg", f"{raw!r:.200}", f"a size for each of {names}, in order")
    sizes = {}
    for camera in contract.cameras:
        hw = raw[camera.name]
        if not isinstance(hw, list) or tuple(hw) not in camera.accepted_hw:
            raise ContractMismatch(
                f"jpeg.{camera.name}", f"{hw!r:.80}", " or ".join(map(str, camera.accepted_hw))
            )
        sizes[camera.name] = camera.accepted_hw[camera.accepted_hw.index(tuple(hw))]
    return sizes


def _hw(schema: Schema, camera: CameraContract) -> tuple[int, int]:
    *_, height, width, _ = schema.specs[messages.IMAGE + camera.name].shape
    return height, width


def _frames(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image of every tick: (n, height, width, 3), n being 1 for an array of one image."""
    return image.reshape(-1, *image.shape[-3:])


def _with_sizes(schema: Schema, sizes: Mapping[str, tuple[int, int]]) -> Schema:
    """``schema`` with images of these sizes, (height, width)."""
    images = {messages.IMAGE + name: hw for name, hw in sizes.items()}
    return Schema(
        tuple(
            ArraySpec(spec.name, spec.dtype, (*spec.shape[:-3], *images[spec.name], 3))
            if spec.name in images
            else spec
            for spec in schema.specs.values()
        )
    )


def _with_jpeg(schema: Schema, sizes: Mapping[str, tuple[int, int]], ticks: int) -> Schema:
    """``schema`` with its images, ``ticks`` of each camera, replaced by the JPEG arrays, of their
    maximum size, at the end.
    """
    pixels = {messages.IMAGE + name for name in sizes}
    rest = (spec for name, spec in schema.specs.items() if name not in pixels)
    return Schema(
        (
            *rest,
            ArraySpec(LENGTHS, "int64", (ticks * len(sizes),)),
            ArraySpec(JPEG + USED, "int64", ()),
            ArraySpec(JPEG, "uint8", (ticks * sum(map(jpeg.max_bytes, sizes.values())),)),
        )
    )
