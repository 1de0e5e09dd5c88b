"""Commands to the control process, its phases, and the signals that a recording keeps."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Order(IntEnum):
    """What the parent wants of the control process; numbered, so that each is obeyed once."""

    HOLD = 0
    START = 1  # move to where the rollout begins, then play the policy
    STOP = 2  # come to rest and hold
    RESUME = 3  # as START, from where the arm is, after a fault
    QUIT = 4  # as STOP, then end
    EMERGENCY = 5  # a person pressed the key: come to rest, latched
    RELEASE = 6  # end a fault without going on


class Phase(IntEnum):
    """What the control process is doing."""

    HOLD = 0  # commanding one pose
    APPROACH = 1  # moving slowly to where the rollout begins
    WAIT = 2  # holding until the first chunk is there
    RUN = 3  # playing the policy
    STOP = 4  # coming to rest
    FAULT = 5  # at rest after a fault; only RESUME or QUIT goes on
    ENDED = 6  # has left on purpose: nobody needs to take over


MOVING = (Phase.APPROACH, Phase.RUN, Phase.STOP)


class Server(IntEnum):
    """What the sensing process knows of the server."""

    CONNECTED = 0
    LOST = 1


class Signal(IntFlag):
    """What happened to the pilot before the command of a period, in this order."""

    NONE = 0
    RESET = 1
    START = 2
    RESUME = 4
    STOP = 8
    FAIL = 16
    WATCHDOG = 32  # this command is the guardian's, of a stop
