"""Commands to the control process, its phases, and the signals that a recording keeps."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class ControlCommand(IntEnum):
    """What the parent tells the control process to do; numbered, so that each takes effect once."""

    HOLD = 0
    START = 1  # move to where the rollout begins, then play the policy
    STOP = 2  # come to rest and hold
    RESUME = 3  # as START, but from the current pose, after a fault
    QUIT = 4  # as STOP, then end
    EMERGENCY = 5  # a key was pressed: come to rest and latch a fault
    RELEASE = 6  # clear a fault without resuming


class Phase(IntEnum):
    """What the control process is doing."""

    HOLD = 0  # commanding one pose
    APPROACH = 1  # moving slowly to where the rollout begins
    WAIT = 2  # holding until the first chunk arrives
    RUN = 3  # playing the policy
    STOP = 4  # coming to rest
    FAULT = 5  # at rest after a fault, until START, RESUME or RELEASE
    ENDED = 6  # the process ended on purpose: the watchdog need not take over


MOVING = (Phase.APPROACH, Phase.RUN, Phase.STOP)
"""Phases in which the arm may move."""


class ServerStatus(IntEnum):
    """The sensing process' connection to the policy server."""

    CONNECTED = 0
    LOST = 1


class Signal(IntFlag):
    """Calls to the motion state machine before the command of a period, applied in this order."""

    NONE = 0
    RESET = 1
    START = 2
    RESUME = 4
    STOP = 8
    FAIL = 16
    WATCHDOG = 32  # the watchdog sent this command, while it brought the arm to rest
