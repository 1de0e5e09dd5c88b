"""Random numbers of one session, for code that draws from torch's global generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomStream:
    """A state of torch's global generators, which is theirs only inside ``use``.

    LeRobot's policies draw from the global generators. With a stream for every session, neither
    another session nor other code of the process changes what a session draws.

    Args:
        device: Where the policy draws: the CPU's and this device's generator are kept.
        seed: 0 to 2⁶³-1.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        self._cuda = [device] if device.type == "cuda" else []
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Restart the stream where ``torch.manual_seed(seed)`` would."""
        self._state = torch.Generator().manual_seed(seed).get_state()
        self._cuda_states = [
            torch.Generator(device).manual_seed(seed).get_state() for device in self._cuda
        ]

    @contextmanager
    def use(self) -> Iterator[None]:
        """Make the global generators continue this stream, and restore them afterwards."""
        with torch.random.fork_rng(devices=self._cuda):
            torch.set_rng_state(self._state)
            for device, state in zip(self._cuda, self._cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            try:
                yield
            finally:
                self._state = torch.get_rng_state()
                self._cuda_states = [torch.cuda.get_rng_state(device) for device in self._cuda]
