"""The documentation is true: its samples run, and what it names exists."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from runtime.eval_real import cli as eval_real
from runtime.eval_sim import cli as eval_sim
from runtime.server import cli as serve
from runtime.tools import ctl, keys, top

ROOT = Path(__file__).resolve().parents[2]
GUIDES = (
    "serve-a-checkpoint",
    "add-an-environment",
    "add-a-robot",
    "safety",
    "many-clients",
    "security",
    "operations",
)
PAGES = [ROOT / "docs" / f"{name}.md" for name in GUIDES]
CLIS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "start_policy_server.py": serve.parser,
    "runtime.server": serve.parser,
    "eval_sim.py": eval_sim.parser,
    "eval_real.py": eval_real.parser,
    "runtime.tools.keys": keys.parser,
    "runtime.tools.ctl": ctl.parser,
    "runtime.tools.top": top.parser,
}
PACKAGES = "policies|runtime|transport|envs|robots|tests|configs|docs"
OVERRIDES = ("--env.", "--robot.")
OTHERS_FLAGS: frozenset[str] = frozenset()
"""Flags of programs that are not ours."""


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def named(page: Path) -> dict[str, str]:
    """Files that a page has its reader write: path, which is the first line, to content."""
    found = {}
    for language in ("python", "yaml"):
        for sample in fences(page, language):
            first, _, _ = sample.partition("\n")
            assert re.fullmatch(r"# mine/\w+\.(py|yaml)", first), f"{page.name}: {first}"
            found[first.removeprefix("# ")] = sample
    return found


def commands(page: Path) -> list[list[str]]:
    """The words of every command line of a page."""
    text = "\n".join(fences(page, "bash")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("python ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of all pages, as a reader would have written them."""
    base = tmp_path_factory.mktemp("reader")
    (base / "mine").mkdir()
    for page in PAGES:
        for path, content in named(page).items():
            (base / path).write_text(content)
    return base


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join((str(folder), str(ROOT), str(ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it said, once it has ended well."""
    try:
        said, complained = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, f"{said}\n{complained}"
    return said, complained


def test_contracts_are_kept_and_the_environment_is_evaluated(folder: Path) -> None:
    """What the pages say one after the other, side by side: most of it is waiting for imports."""
    (words,) = [w for w in commands(PAGES[1]) if "mine/reach.yaml" in w and "eval_sim.py" in w]
    options = ("-q", "-p", "no:cacheprovider", "-W", "error", "--rootdir", str(folder))
    with start(folder, "-m", "pytest", *options, "mine") as contracts:
        try:
            evaluation, _ = end(start(folder, str(ROOT / words[1]), *words[2:], "--videos", "0"))
        finally:
            verdict, _ = end(contracts)
    assert "success      2/2" in evaluation
    passed = re.search(r"(\d+) passed", verdict)
    assert passed is not None
    assert int(passed[1]) >= 20


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """A server of the page's own policy."""
    with start(
        folder, "-m", "runtime.server", "-m", "python:mine.policy:make", "-p", "0"
    ) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            assert "started on" in line
            yield line.split()[-1]
        finally:
            server.send_signal(signal.SIGINT)
            end(server)


def test_the_client_is_answered_by_the_policy(folder: Path, address: str) -> None:
    client = folder / "mine" / "client.py"
    client.write_text(client.read_text().replace("127.0.0.1:5000", address))
    said, _ = end(start(folder, "-m", "mine.client"))
    expected = (ROOT / "docs/serve-a-checkpoint.md").read_text()
    shape, transport = said.strip().splitlines()
    assert f"`{shape}`" in expected
    assert f"`{transport}`" in expected


def test_the_policies_are_what_a_server_would_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from policies.checkpoint.factory import load_factory
    from policies.types import MetaObs

    monkeypatch.syspath_prepend(str(folder))
    for name in ("policy", "middle", "wave"):
        policy = load_factory(f"python:mine.{name}:make")
        contract = policy.contract
        images = {c.name: np.zeros((*c.source_hw, 3), np.uint8) for c in contract.cameras}
        chunk = policy.infer(MetaObs(images, np.zeros(contract.state_dim, np.float32)))
        assert chunk.actions.shape == (contract.chunk_size, contract.action_dim)
        assert chunk.actions.dtype == np.float32
        assert policy.fork() is policy


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_samples_are_yaml(page: Path) -> None:
    for sample in fences(page, "yaml"):
        assert isinstance(yaml.safe_load(sample), dict)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_understood(page: Path, folder: Path) -> None:
    for words in commands(page):
        module = words[1] == "-m"
        program, rest = (words[2], words[3:]) if module else (words[1], words[2:])
        if program == "pytest":
            continue
        if module:
            written = (folder / f"{program.replace('.', '/')}.py").is_file()
            assert written or importlib.util.find_spec(program) is not None, program
        else:
            assert (ROOT / program).is_file(), program
        if program in CLIS:
            _, unknown = CLIS[program]().parse_known_args(rest)
            flags = [word for word in unknown if word.startswith("-")]
            assert all(flag.startswith(OVERRIDES) for flag in flags), (program, flags)


def flags_of(cli: argparse.ArgumentParser) -> set[str]:
    """Those of its commands, too."""
    flags = set(cli._option_string_actions)
    for action in cli._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags |= {flag for command in action.choices.values() for flag in flags_of(command)}
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_exists(page: Path) -> None:
    known = {flag for make in CLIS.values() for flag in flags_of(make())}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w.]*", page.read_text()))
    wrong = {flag for flag in mentioned - known if not flag.startswith(OVERRIDES)}
    assert not wrong - OTHERS_FLAGS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_exists(page: Path, folder: Path) -> None:
    names = re.findall(rf"`((?:(?:{PACKAGES}|mine)/)[\w./-]*|\w+\.py)`", page.read_text())
    for name in names:
        if "NAME" in name:
            continue
        assert (ROOT / name).exists() or (folder / name).exists(), name
    for module in re.findall(rf"`((?:{PACKAGES})(?:\.\w+)+)`", page.read_text()):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target), link


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
