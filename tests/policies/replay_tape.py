"""A stand-in for captured graphs on the CPU: records a step's operations and runs them again.

A replay calls the recorded operations on the recorded tensors, without any Python of the step. So a
step that decides something in Python for each tick, or reads memory that it has not written, gives
wrong results here as it would in a graph: all that the step allocated is NaN before each replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten

SYNCHRONIZING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
}
"""Operations whose result the host waits for, or whose result's size depends on it."""
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operations that write nothing."""


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Records while it is the current mode.

    Attributes:
        calls: (operation, arguments, keyword arguments, results) of all that computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self._own: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in SYNCHRONIZING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        new = [t for t in tensors_in(results) if t.untyped_storage().data_ptr() not in given]
        for tensor in new:
            self._own[tensor.untyped_storage().data_ptr()] = tensor
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        allocates = func._schema.name.removeprefix("aten::") in ALLOCATING
        if (new or writes) and not allocates:
            self.calls.append((func, args, kwargs, [] if writes else tensors_in(results)))
        return results

    @property
    def kernels(self) -> int:
        """About as many kernels does a GPU run, one for each call.

        A convolution's bias is a kernel of its own, and padding fills before it copies.
        """
        return len(self.calls) + sum(
            (func is aten.conv2d.default and args[2] is not None) or func is aten.pad.default
            for func, args, _, _ in self.calls
        )

    def poison(self) -> None:
        """Fill all that the step allocated with NaN, or 255."""
        for tensor in self._own.values():
            bytes_of = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            bytes_of.fill_(255)  # NaN in every floating-point format

    def replay(self) -> None:
        self.poison()
        with torch.inference_mode():
            for func, args, kwargs, results in self.calls:
                again = tensors_in(func(*args, **kwargs))
                for recorded, value in zip(results, again, strict=False):
                    recorded.copy_(value)


class TapeCuda:
    """``CudaApi`` on the CPU. Queues like a stream: nothing happens before ``wait``.

    What it does not show: anything of a real capture, and that copies and graphs keep their order
    on a stream.

    Args:
        capture_errors: By batch size: raised instead of a capture.
    """

    device = torch.device("cpu")

    def __init__(self, *, capture_errors: dict[int, BaseException] | None = None) -> None:
        self.capture_errors = capture_errors or {}
        self.queue: list[Callable[[], object]] = []
        self.copied: list[tuple[int, int]] = []
        self.replayed: list[int] = []
        self.tapes: dict[int, Tape] = {}
        self.entered = self.allocated_after_capture = 0
        self.closed = self.lost = self.inside = False

    def buffer(self, shape, dtype):
        self.allocated_after_capture += bool(self.tapes)
        return torch.zeros(shape, dtype=dtype)

    pinned = buffer

    def capture(self, step):
        size = step.args[0]
        for key in (size, None):
            if key in self.capture_errors:
                raise self.capture_errors[key]
        step()
        tape = Tape()
        with tape:
            step()
        self.tapes[size] = tape

        def replay():
            assert self.inside, "not in the stream"
            self.queue.append(tape.replay)
            self.replayed.append(size)

        return replay

    @contextlib.contextmanager
    def in_stream(self) -> Iterator[None]:
        self.entered += 1
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def copy(self, target, source):
        assert self.inside, "not in the stream"
        self.copied.append((source.data_ptr(), source.numel()))
        self.queue.append(lambda: target.copy_(source))

    def wait(self):
        for work in self.queue:
            work()
        self.queue.clear()

    def is_lost(self):
        self.queue.clear()
        return self.lost

    def close(self):
        self.closed = True


def _add_relu(  # noqa: PLR0917 - cuDNN's signature
    x, weight, z, alpha, bias, stride, padding, dilation, groups
):
    """cuDNN's operation: computed in float32, rounded once."""
    given = (t.float() for t in (x, weight, bias))
    y = F.conv2d(*given, stride, padding, dilation, groups)
    return torch.relu(y + alpha * z.float()).to(x.dtype, memory_format=torch.channels_last)


def _add_relu_shape(  # noqa: PLR0917 - cuDNN's signature
    x, weight, z, alpha, bias, stride, padding, dilation, groups
):
    assert z.shape == F.conv2d(x, weight, bias, stride, padding, dilation, groups).shape
    return torch.empty_like(z)


@contextlib.contextmanager
def cudnn_on_cpu() -> Iterator[None]:
    """Give the CPU cuDNN's fused operation, meanwhile."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_add_relu", _add_relu, "CPU")
    library.impl("cudnn_convolution_add_relu", _add_relu_shape, "Meta")
    try:
        yield
    finally:
        library._destroy()
