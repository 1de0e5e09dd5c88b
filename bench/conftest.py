"""Prints the run's tables and budgets after pytest's own, and holds the samples."""

from __future__ import annotations

import pytest

from bench import budgets
from bench.records import Records

_RECORDS = pytest.StashKey[Records]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("budgets")
    group.addoption(
        "--enforce-budgets", action="store_true", help="an exceeded budget fails the run"
    )
    group.addoption("--long", action="store_true", help="also what takes minutes by itself")
    group.addoption("--device", default="cpu", help="of served inference: cpu, cuda or cuda:N")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = Records()


@pytest.fixture(scope="session")
def records(pytestconfig: pytest.Config) -> Records:
    """Where a benchmark puts its samples."""
    return pytestconfig.stash[_RECORDS]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    _, exceeded = budgets.report(budgets.load(), config.stash[_RECORDS])
    if exceeded and config.getoption("--enforce-budgets") and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    records = config.stash[_RECORDS]
    for group in records.groups:
        terminalreporter.write_line("")
        terminalreporter.write_line(records.table(group, to="floor"))
    if records.samples or records.values:
        table, exceeded = budgets.report(budgets.load(), records)
        terminalreporter.write_line("")
        terminalreporter.write_line(table)
        if exceeded and not config.getoption("--enforce-budgets"):
            terminalreporter.write_line("(--enforce-budgets makes an exceeded one a failure)")
