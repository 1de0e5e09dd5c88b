"""Lines about clients are bounded, and say what they leave out."""

from __future__ import annotations

import logging

import pytest

from runtime.gateway.client_log import BURST, EVERY_S, ClientErrors, ClientLog

logger = logging.getLogger(__name__)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock, caplog: pytest.LogCaptureFixture) -> ClientLog:
    caplog.set_level(logging.INFO, __name__)
    return ClientLog(logger, clock)


def test_lines_beyond_the_budget_are_counted(
    log: ClientLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(BURST + 30):
        log.write(logging.WARNING, f"{number}")
    assert caplog.messages == [f"{number}" for number in range(BURST)]
    log.write(logging.ERROR, "of another level")
    clock.now_s += 2 * EVERY_S
    for text in ("a", "b", "c"):
        log.write(logging.WARNING, text)
    more = caplog.messages[BURST:]
    assert more == ["of another level", "a (before it, 30 lines were left out)", "b"]


def test_the_budget_is_full_again_after_a_while_and_never_fuller(
    log: ClientLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for pause_s in (0.0, 10 * BURST * EVERY_S):
        clock.now_s += pause_s
        caplog.clear()
        for _ in range(2 * BURST):
            log.write(logging.INFO, "line")
        assert len(caplog.messages) == BURST


def test_a_line_that_nobody_sees_costs_nothing(
    log: ClientLog, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, __name__)
    for _ in range(2 * BURST):
        log.write(logging.INFO, "unseen")
    caplog.set_level(logging.INFO, __name__)
    log.write(logging.INFO, "seen")
    assert caplog.messages == ["seen"]


def test_a_text_is_no_format(log: ClientLog, caplog: pytest.LogCaptureFixture) -> None:
    log.write(logging.INFO, "100 %s")
    assert caplog.messages == ["100 %s"]


def test_an_error_is_a_line_when_it_begins_and_one_when_it_is_over(
    log: ClientLog, caplog: pytest.LogCaptureFixture
) -> None:
    errors = ClientErrors(log, "robot")
    errors.worked()
    for number in range(4):
        errors.failed("server", f"lost {number}")
    errors.worked()
    errors.worked()
    errors.failed("server", "lost again")
    errors.failed("image", "no image")
    errors.worked()
    assert caplog.messages == [
        "robot: lost 0",
        "robot: requests succeed again (after 3 more errors like the last one)",
        "robot: lost again",
        "robot: no image",
        "robot: requests succeed again",
    ]
