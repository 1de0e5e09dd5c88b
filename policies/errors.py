"""What can go wrong with a policy, one tree."""

from __future__ import annotations


class PolicyError(Exception):
    """Anything this package raises on purpose."""


class CheckpointError(PolicyError):
    """A checkpoint that cannot be loaded; the message names the file and what was expected."""


class ContractMismatch(PolicyError):
    """What was offered is not what the policy needs.

    Attributes:
        field: The field of the contract or of the observation, e.g. ``"images.top"``.
        got: What was offered, as text.
        expected: What is needed, as text; lists the valid choices where there are several.
    """

    def __init__(self, field: str, got: str, expected: str) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}")
        self.field, self.got, self.expected = field, got, expected


class ObservationError(PolicyError):
    """One observation that the policy must not act on, e.g. a NaN in its state."""


class InferenceError(PolicyError):
    """The model failed, or produced something that is not an action."""


class RequestExpired(InferenceError):
    """The time that a request had was up, or would have been, before it could be computed."""


class DeviceLost(InferenceError):
    """The device failed for good: this process computes nothing on it any more.

    A CUDA error such as an illegal memory access leaves the process's context unusable. The process
    has to end, so that a supervisor starts a new one.
    """


class UpstreamLost(InferenceError):
    """The other system's server that computes the policy is gone, silent or unreadable.

    A later request may succeed: it connects again.
    """
