"""What one inference of ACT has to compute and to read, from its sizes alone, and the time that a
machine of given speed needs for that at least.

Counted are multiplications and additions of convolutions and matrix products, a multiply-add as
two, in the direct algorithm (padding included, as torch's counter does). Winograd's algorithm does
fewer and rounds otherwise. What is done element by element costs memory traffic rather than
arithmetic, and none of that traffic is counted: all of it could stay in a cache. So the bound can
not be reached, only approached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from policies.act.config import BLOCKS, CHANNELS, ActConfig


@dataclass(frozen=True, slots=True)
class Op:
    """A convolution or matrix product.

    Attributes:
        flops: For one observation.
        weights: Parameters it reads, biases included; 0 where both factors are activations.
        constant: Its result does not depend on the observation.
    """

    name: str
    flops: int
    weights: int = 0
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """Of one inference.

    Attributes:
        flops: As the module counts them.
        n_bytes: What must come from memory or go there: each weight once, pictures as uint8,
            state and actions.
    """

    flops: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured: the most that any kernel reached."""

    flops_per_s: float
    bytes_per_s: float

    def bound_s(self, work: Work) -> float:
        """At least this long: arithmetic and memory at their best and at the same time.

        Williams et al., Roofline, https://doi.org/10.1145/1498765.1498785.
        """
        return max(work.flops / self.flops_per_s, work.n_bytes / self.bytes_per_s)


def plain_flops(config: ActConfig) -> int:
    """What the plain module computes, constants included."""
    return sum(op.flops for op in operations(config))


def necessary_work(config: ActConfig, bytes_per_weight: int) -> Work:
    """What is left once everything constant has been computed beforehand."""
    needed = [op for op in operations(config) if not op.constant]
    height, width = config.image_hw
    # What stands for the constants: image positions, and per action the decoder's first
    # normalized sum and its cross-attention query.
    tables = config.width * (tokens(config) + 2 * config.chunk_size)
    weights = sum(op.weights for op in needed) + tables
    pictures = config.n_cameras * height * width * 3
    numbers = 4 * (config.state_dim + config.chunk_size * config.action_dim)
    return Work(
        flops=sum(op.flops for op in needed),
        n_bytes=weights * bytes_per_weight + pictures + numbers,
    )


def layered_bound_s(config: ActConfig, bytes_per_weight: int, machine: Machine) -> float:
    """As ``Machine.bound_s``, one operation after the other: no weight is fetched while another
    layer computes. Nothing forbids that, but hardware prefetch does not look that far ahead; so
    this is what an engine that runs layer by layer can come close to.
    """
    return sum(
        machine.bound_s(Work(op.flops, op.weights * bytes_per_weight))
        for op in operations(config)
        if not op.constant
    )


def tokens(config: ActConfig) -> int:
    """Of the encoder: the latent, the state, and each camera's features."""
    height, width = config.features_hw
    return 2 + config.n_cameras * height * width


def operations(config: ActConfig) -> Iterator[Op]:
    """Everything that the plain module computes, in its order."""
    yield from _backbone(config)
    yield _linear("image_proj", tokens(config) - 2, CHANNELS[-1], config.width)
    yield _linear("state_proj", 1, config.state_dim, config.width)
    n, chunk, width = tokens(config), config.chunk_size, config.width
    for i in range(config.n_encoder_layers):
        name = f"encoder.{i}"
        yield from _attention(f"{name}.self_attn", n, n, width)
        yield from _feed_forward(name, n, config)
    for i in range(config.n_decoder_layers):
        name = f"decoder.{i}"
        if i == 0:
            # Of zeros, all that is left is the output projection of the value bias.
            yield _linear(f"{name}.self_attn.out", 1, width, width, constant=True)
        else:
            yield from _attention(f"{name}.self_attn", chunk, chunk, width)
        yield from _attention(f"{name}.cross_attn", chunk, n, width, constant_query=i == 0)
        yield from _feed_forward(name, chunk, config)
    yield _linear("action_head", chunk, width, config.action_dim)


def _backbone(config: ActConfig) -> Iterator[Op]:
    height, width = (_halved(side) for side in config.image_hw)
    copies = len(config.backbone_names)

    def convolution(name: str, kernel: int, inputs: int, outputs: int) -> Op:
        weights = kernel * kernel * inputs * outputs
        return Op(
            f"backbone.{name}",
            2 * weights * height * width * config.n_cameras,
            copies * (weights + outputs),
        )

    yield convolution("conv1", 7, 3, CHANNELS[0])
    height, width = _halved(height), _halved(width)
    inputs = CHANNELS[0]
    for stage, (outputs, blocks) in enumerate(
        zip(CHANNELS, BLOCKS[config.backbone], strict=True), start=1
    ):
        if stage > 1:
            height, width = _halved(height), _halved(width)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            yield convolution(f"{name}.conv1", 3, inputs, outputs)
            yield convolution(f"{name}.conv2", 3, outputs, outputs)
            if inputs != outputs:
                yield convolution(f"{name}.downsample", 1, inputs, outputs)
            inputs = outputs


def _attention(
    name: str, queries: int, keys: int, width: int, *, constant_query: bool = False
) -> Iterator[Op]:
    yield _linear(f"{name}.q", queries, width, width, constant=constant_query)
    yield _linear(f"{name}.k", keys, width, width)
    yield _linear(f"{name}.v", keys, width, width)
    yield Op(f"{name}.scores", 2 * queries * keys * width)
    yield Op(f"{name}.mix", 2 * queries * keys * width)
    yield _linear(f"{name}.out", queries, width, width)


def _feed_forward(name: str, rows: int, config: ActConfig) -> Iterator[Op]:
    yield _linear(f"{name}.linear1", rows, config.width, config.feedforward)
    yield _linear(f"{name}.linear2", rows, config.feedforward, config.width)


def _linear(name: str, rows: int, inputs: int, outputs: int, *, constant: bool = False) -> Op:
    return Op(name, 2 * rows * inputs * outputs, inputs * outputs + outputs, constant)


def _halved(side: int) -> int:
    return -(-side // 2)
