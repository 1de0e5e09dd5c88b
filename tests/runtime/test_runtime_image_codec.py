"""Image encoding: resized by the client, as JPEG, and the server's checks of both."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from policies import jpeg
from policies.errors import ContractMismatch, ObservationError
from policies.image_resize import prepare
from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo
from runtime.client import PolicyClient
from runtime.control.observation_history import stack_ticks
from runtime.options.connection import ConnectionOptions
from runtime.protocol import image_codec, messages
from runtime.server import PolicyServer
from tests.runtime.command import status_of
from transport.errors import Refused
from transport.schema import USED, ArraySpec, Schema

CAMERAS = (
    CameraContract("top", (48, 64), (20, 24), crop=(4, 8, 40, 48), resize="bilinear"),
    CameraContract("wrist", (40, 32), (20, 16), resize="area"),
    CameraContract("side", (24, 32), (24, 32), crop=(2, 2, 12, 16), resize="bilinear"),
    CameraContract("plain", (16, 16), (16, 16)),
)
CONTRACT = PolicyContract(
    policy_type="looking",
    cameras=CAMERAS,
    state_dim=3,
    action_dim=len(CAMERAS),
    chunk_size=2,
    n_action_steps=2,
)


class LookingPolicy:
    """Its actions are checksums of the images that the network would get."""

    def __init__(self) -> None:
        self.contract, self.info = CONTRACT, PolicyInfo("looking", engine="numpy")
        self.seen: dict[str, tuple[int, ...]] = {}

    def infer(self, obs: MetaObs) -> ActionChunk:
        self.seen = {name: image.shape for name, image in obs.images.items()}
        weights = np.arange(1, 8192 * 3 + 1, dtype=np.int64) % 8191
        sums = []
        for camera in self.contract.cameras:
            pixels = prepare(obs.images[camera.name], camera).reshape(-1)
            sums.append(int((pixels * weights[: pixels.size]).sum() % 2**24))
        return ActionChunk(
            np.tile(np.array(sums, np.float32), (2, 1)), obs.timestep, obs.t_capture_ns
        )

    def reset(self) -> None: ...

    def fork(self) -> LookingPolicy:
        return self

    def close(self) -> None: ...


def observation(seed: int = 0, *, smooth: bool = False) -> MetaObs:
    rng = np.random.default_rng(seed)
    images = {}
    for camera in CAMERAS:
        height, width = camera.source_hw
        images[camera.name] = (
            np.broadcast_to(np.uint8(3 * np.arange(width))[None, :, None], (height, width, 3))
            if smooth
            else rng.integers(0, 256, (height, width, 3), np.uint8)
        )
    return MetaObs(images=images, state=np.arange(3, dtype=np.float32), timestep=seed)


SCHEMA = messages.observation_schema(observation())


@contextmanager
def serving(policy: LookingPolicy, transports: tuple[str, ...] = ("shm", "zmq")) -> Iterator[str]:
    with PolicyServer(policy, transports=transports) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield f"{server.host}:{server.port}"
        finally:
            server.stop("the test is over")
            thread.join()


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_resizing_at_the_client_gives_the_same_bits(transport: str) -> None:
    policy, local = LookingPolicy(), LookingPolicy()
    with (
        serving(policy) as address,
        PolicyClient(address, transport=transport, deterministic=True) as plain,
        PolicyClient(address, transport=transport, deterministic=True, resize=True) as resizing,
    ):
        for seed in range(10):
            obs = observation(seed)
            expected = local.infer(obs).actions.tobytes()
            assert plain.infer(obs).actions.tobytes() == expected
            assert policy.seen["top"] == (48, 64, 3)
            assert resizing.infer(obs).actions.tobytes() == expected
            # "side" has the same size before and after its crop, so only the server may crop it.
            assert policy.seen == {
                "top": (20, 24, 3),
                "wrist": (20, 16, 3),
                "side": (24, 32, 3),
                "plain": (16, 16, 3),
            }
        assert (plain.pictures, resizing.pictures) == ("as they are", "resized by the client")
        assert plain.deterministic and resizing.deterministic


@pytest.mark.parametrize("options", [{}, {"resize": True}, {"jpeg_quality": 100}])
def test_images_rendered_into_the_loan_arrive(options) -> None:
    if "jpeg_quality" in options:
        pytest.importorskip("simplejpeg")
    with (
        serving(LookingPolicy()) as address,
        PolicyClient(address, transport="zmq", **options) as client,
        PolicyClient(address, transport="zmq", **options) as other,
    ):
        client.open(SCHEMA)
        for seed in range(3):
            obs = observation(seed, smooth=True)
            images = client.loan_images()
            assert {name: image.shape for name, image in images.items()} == {
                name: image.shape for name, image in obs.images.items()
            }
            for name, image in images.items():
                image[...] = obs.images[name]
            lent = client.infer(dataclasses.replace(obs, images=images))
            assert lent.actions.tobytes() == other.infer(obs).actions.tobytes()


def test_other_image_size_is_refused_before_resizing() -> None:
    with serving(LookingPolicy()) as address, PolicyClient(address, resize=True) as client:
        client.infer(observation())
        odd = observation()
        odd.images = {**odd.images, "top": np.zeros((20, 24, 3), np.uint8)}
        with pytest.raises(ContractMismatch, match=r"images\.top: got uint8 \(20, 24, 3\)"):
            client.infer(odd)
        odd.images = {"top": odd.images["top"]}
        with pytest.raises(ContractMismatch, match="cameras"):
            client.infer(odd)
        client.infer(observation())


# JPEG


@pytest.fixture
def codec():
    return pytest.importorskip("simplejpeg")


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize("resize", [False, True])
def test_jpeg_over_the_network(resize: bool) -> None:
    policy = LookingPolicy()
    with (
        serving(policy, ("zmq",)) as address,
        PolicyClient(address, jpeg_quality=95, resize=resize, deterministic=True) as client,
    ):
        for seed in range(5):
            obs = observation(seed, smooth=True)
            assert client.infer(obs).obs_timestep == seed
        assert client.transport == "zmq"
        assert "it offers zmq only" in client.transport_reason or "offered" in (
            client.transport_reason
        )
        assert client.pictures.endswith("JPEG of quality 95")
        assert not client.deterministic  # what arrives is not what was sent
        assert policy.seen["top"] == ((20, 24, 3) if resize else (48, 64, 3))


@pytest.mark.usefixtures("codec")
def test_jpeg_session_gets_the_codecs_pixels() -> None:
    policy, seen = LookingPolicy(), {}

    def infer(obs: MetaObs) -> ActionChunk:
        seen.update({name: image.copy() for name, image in obs.images.items()})
        assert not any(image.flags.writeable for image in obs.images.values())
        return LookingPolicy.infer(policy, obs)

    policy.infer = infer
    obs = observation(3)
    with (
        serving(policy) as address,
        PolicyClient(address, transport="zmq", jpeg_quality=60) as client,
    ):
        client.infer(obs)
    for name, image in obs.images.items():
        expected = np.empty_like(image)
        jpeg.decode(np.frombuffer(jpeg.encode(image, 60), np.uint8), expected)
        assert (seen[name] == expected).all()
        assert (seen[name] != image).any()


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_shared_memory_never_uses_jpeg(transport: str) -> None:
    obs = observation(1)
    expected = LookingPolicy().infer(obs).actions.tobytes()
    with (
        serving(LookingPolicy()) as address,
        PolicyClient(address, transport=transport, jpeg_quality=10) as client,
    ):
        assert client.infer(obs).actions.tobytes() == expected
        assert (client.transport, client.pictures) == ("shm", "as they are")


@pytest.mark.usefixtures("codec")
def test_jpeg_sends_fewer_bytes() -> None:
    sent: list[int] = []
    with (
        serving(LookingPolicy()) as address,
        PolicyClient(address, transport="zmq", jpeg_quality=90) as client,
    ):
        client.infer(observation(0, smooth=True))
        channel = client._session.channel
        send = channel._connection.send
        channel._connection.send = lambda frame: (sent.append(len(frame)), send(frame))[1]
        client.infer(observation(1, smooth=True))
        channel._connection.send = send
    assert 0 < max(sent) < SCHEMA.nbytes / 2


@pytest.mark.usefixtures("codec")
def test_invalid_jpeg_fails_its_request_only() -> None:
    real = jpeg.encode

    def spoil(data: bytes, how: str) -> bytes:
        if how == "cut":
            return data[: len(data) // 2]
        if how == "larger":
            return real(np.zeros((480, 640, 3), np.uint8), 50)
        return b"\xff" * 40

    with (
        serving(LookingPolicy()) as address,
        PolicyClient(address, transport="zmq", jpeg_quality=90) as client,
    ):
        client.infer(observation(0))
        for how, message in (
            ("cut", r"images\.top: JPEG"),
            ("larger", r"images\.top: JPEG: got 8 bit \(480, 640, 3\), expected 8 bit \(48, 64"),
            ("noise", "expected a JPEG"),
        ):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jpeg, "encode", lambda i, q, how=how: spoil(real(i, q), how))
                with pytest.raises(ObservationError, match=message):
                    client.infer(observation(1))
            assert client.infer(observation(2)).obs_timestep == 2
        assert client.statistics().failures == 3
        assert client.statistics().sessions == 1


@pytest.mark.parametrize(("resize", "names"), [(True, ["top", "wrist"]), (False, [])])
def test_resizing_is_warmed_up_by_the_constructor(
    monkeypatch, resize: bool, names: list[str]
) -> None:
    warm: list[CameraContract] = []
    monkeypatch.setattr(image_codec, "warm_up", warm.extend)
    image_codec.ObservationWriter(SCHEMA, CONTRACT, resize=resize, quality=None)
    assert [camera.name for camera in warm] == names


def jpeg_session() -> tuple[Schema, dict[str, object]]:
    outgoing = image_codec.ObservationWriter(SCHEMA, CONTRACT, resize=False, quality=90)
    return outgoing.schema, outgoing.attributes


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize(
    ("said", "field"),
    [
        ("yes", "jpeg"),
        ({}, "jpeg"),
        ({"top": [48, 64]}, "jpeg"),
        ({**{c.name: list(c.source_hw) for c in CAMERAS}, "top": [4800, 6400]}, "jpeg.top"),
        ({**{c.name: list(c.source_hw) for c in CAMERAS}, "top": "48x64"}, "jpeg.top"),
        ({c.name: list(c.model_hw) for c in CAMERAS}, "jpeg"),  # the schema says source sizes
    ],
)
def test_invalid_jpeg_declaration_is_refused(said, field: str) -> None:
    schema, attributes = jpeg_session()
    image_codec.observation_reader(schema, attributes, CONTRACT)
    with pytest.raises(ContractMismatch) as error:
        image_codec.observation_reader(schema, {image_codec.JPEG: said}, CONTRACT)
    assert error.value.field == field


@pytest.mark.usefixtures("codec")
def test_undeclared_jpeg_or_another_maximum_is_refused() -> None:
    schema, attributes = jpeg_session()
    with pytest.raises(ContractMismatch, match="cameras"):
        image_codec.observation_reader(schema, {}, CONTRACT)
    *rest, last = schema.specs.values()
    larger = Schema((*rest, ArraySpec(last.name, last.dtype, (last.shape[0] * 2,))))
    with pytest.raises(ContractMismatch, match="jpeg"):
        image_codec.observation_reader(larger, attributes, CONTRACT)


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize("lengths", [[0, 1, 1, 1], [-5, 8, 8, 8], [9, 9, 9, 9], [2**62] * 4])
def test_inconsistent_jpeg_lengths_are_an_error(lengths: list[int]) -> None:
    schema, attributes = jpeg_session()
    read = image_codec.observation_reader(schema, attributes, CONTRACT)
    arrays = schema.views(bytearray(schema.nbytes), writable=True)
    arrays[image_codec.LENGTHS][:] = lengths
    arrays[image_codec.JPEG + USED][()] = 4
    with pytest.raises(ObservationError, match="lengths"):
        read(arrays)


def test_missing_codec_is_an_error_on_either_side(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(LookingPolicy()) as address:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "simplejpeg", None)
            with pytest.raises(jpeg.JpegMissing, match=r"pip install simplejpeg"):
                PolicyClient(address, jpeg_quality=90)
        pytest.importorskip("simplejpeg")
        with PolicyClient(address, transport="zmq", jpeg_quality=90) as client:
            client.info  # noqa: B018  it is connected
            real = image_codec.observation_reader

            def without(*arguments):
                with monkeypatch.context() as patch:
                    patch.setitem(sys.modules, "simplejpeg", None)
                    return real(*arguments)

            monkeypatch.setattr(image_codec, "observation_reader", without)
            with pytest.raises(Refused, match=r"jpeg: got images as JPEG.*at the server.*pip"):
                client.infer(observation())


@pytest.mark.parametrize("quality", [0, 101, -1])
def test_quality_out_of_range_is_an_error(quality: int) -> None:
    with pytest.raises(ValueError, match=f"jpeg_quality: got {quality}, expected 1 to 100"):
        PolicyClient("127.0.0.1:1", jpeg_quality=quality)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--jpeg", "0"], "--jpeg: got 0, expected 1 to 100"),
        (["--jpeg"], "--jpeg: pictures as JPEG need simplejpeg"),
    ],
)
def test_command_line_refuses_invalid_options_at_once(
    flags: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from runtime.eval_sim import cli as eval_sim

    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    argv = ["-m", "127.0.0.1:5000", "-e", "fake", *flags]
    assert status_of(eval_sim.main, argv) == eval_sim.BAD_INPUT
    assert complaint in capsys.readouterr().err


@pytest.mark.usefixtures("codec")
def test_command_line_passes_image_options_on() -> None:
    from runtime.eval_sim.cli import read_config

    plan = read_config(["-m", "127.0.0.1:5000", "--jpeg", "--resize"])
    assert plan.connection == ConnectionOptions("auto", True, jpeg.DEFAULT_QUALITY)
    plan = read_config(["-m", "127.0.0.1:5000"])
    assert plan.connection == ConnectionOptions()


@pytest.mark.parametrize("options", [{"resize": False}, {"resize": True}])
@pytest.mark.parametrize("quality", [None, 90])
def test_images_of_several_ticks_are_those_of_each_tick(options, quality: int | None) -> None:
    if quality is not None:
        pytest.importorskip("simplejpeg")

    def sent(obs: MetaObs, contract: PolicyContract) -> MetaObs:
        schema = messages.observation_schema(obs)
        writer = image_codec.ObservationWriter(schema, contract, **options, quality=quality)
        arrays = {s.name: np.zeros(s.shape, s.dtype) for s in writer.schema.specs.values()}
        targets = writer.render_targets(arrays)
        assert {n: a.shape for n, a in targets.items()} == {
            n: a.shape for n, a in obs.images.items()
        }
        writer.write(obs, arrays)
        read = image_codec.observation_reader(writer.schema, writer.attributes, contract)
        return read(arrays)

    ticks = [observation(seed, smooth=seed == 1) for seed in (1, 2)]
    both = sent(stack_ticks(ticks), dataclasses.replace(CONTRACT, n_obs_steps=2))
    for index, one in enumerate(ticks):
        alone = sent(one, CONTRACT)
        assert both.state[index].tolist() == alone.state.tolist()
        for name, image in alone.images.items():
            assert both.images[name].shape == (2, *image.shape)
            assert both.images[name][index].tobytes() == image.tobytes()
