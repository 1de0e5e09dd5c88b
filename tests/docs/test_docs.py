"""The documentation is true: its samples run, and what it names exists."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from runtime.__main__ import COMMANDS as SUBCOMMANDS
from tests.docs import flags_page

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
"""Pages whose samples are run; the paths of their files are in the first lines."""
PAGES = [ROOT / "docs" / f"{name}.md" for name in GUIDES]
README, CHANGELOG = ROOT / "README.md", ROOT / "CHANGELOG.md"
DOCUMENTS = [
    *sorted(ROOT.glob("docs/*.md")),
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("ckpt/*/README.md")),
]

COMMANDS = {name: module for name, (module, _) in SUBCOMMANDS.items()}
"""``metronome NAME``, and the module that has its ``parser``."""
PROGRAMS = {
    "start_policy_server.py": COMMANDS["serve"],
    "runtime.server": COMMANDS["serve"],
    "eval_sim.py": COMMANDS["eval-sim"],
    "eval_real.py": COMMANDS["eval-real"],
    "runtime.trace": COMMANDS["trace"],
}
"""Scripts and packages of which another module has the ``parser``."""
PARSED = (
    *("envs.demonstrations", "bench.compare", "bench.rollouts", "bench.strategies"),
    *("bench.inference.gpu", "bench.recording_lateness", "bench.latency_relay"),
)
"""Further modules with flags of their own that documents mention."""
PACKAGES = "policies|runtime|transport|envs|robots|tests|configs|docs|bench|ckpt"
SOURCES = ("policies", "runtime", "transport", "envs", "robots", "bench", "tests", "configs")
OVERRIDES = ("--env.", "--robot.")
PYTEST_FLAGS = {"-q", "-k"}
OTHERS_FLAGS = frozenset(
    (
        *("--server_address", "--policy_type", "--pretrained_name_or_path", "--policy_device"),
        *("--actions_per_chunk", "--address", "--head", "--include-dashboard"),
    )
)
"""Of LeRobot's ``robot_client``; of ``ray start``."""
OTHERS_CLASSES = frozenset({"Box", "Discrete", "CNNMLP"})
"""Of gymnasium; a policy that is refused."""
OTHERS_WORDS = frozenset({"SCM_RIGHTS", "policy_last"})
"""Of the kernel; of act-plus-plus."""
PRIVATE_WORDS = (
    *("guardian", "crew", "mailbox", "pilot", "attendance", "wishes", "footage", "playback"),
    *("errand", "bells?", "roster", "reactor", "mission", "unfit", "in-flight table"),
    *("passe[sd] over", "pass over", "look(?:s|ed)? after", "twin board"),
)
"""What had names of its own before; a standard term has replaced each."""


class Words(NamedTuple):
    """A command line of a document.

    Attributes:
        whole: Whether it stands in a block, to be copied; else it may leave out arguments.
    """

    words: list[str]
    whole: bool


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@functools.cache
def spans(page: Path) -> list[str]:
    """What stands between single backticks."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)
    return [span.replace("\\|", "|").replace("\n", " ") for span in found]


def named(page: Path) -> dict[str, str]:
    """Files that a page has its reader write: path, which is the first line, to content."""
    found = {}
    for language in ("python", "yaml"):
        for sample in fences(page, language):
            first, _, _ = sample.partition("\n")
            assert re.fullmatch(r"# mine/\w+\.(py|yaml)", first), f"{page.name}: {first}"
            found[first.removeprefix("# ")] = sample
    return found


def commands(page: Path) -> list[Words]:
    """The words of every command line of a page, without variables before it."""
    text = "\n".join(fences(page, "bash")).replace("\\\n", " ")
    found = [Words(shlex.split(line, comments=True), True) for line in text.splitlines()]
    started = r"(?:[A-Z_]+=\S+ )*(?:metronome|python|pytest|make) "
    found += [Words(shlex.split(span), False) for span in spans(page) if re.match(started, span)]
    return [
        Words(words, whole)
        for words, whole in ((without_variables(words), whole) for words, whole in found)
        if words
    ]


def without_variables(words: list[str]) -> list[str]:
    start = 0
    while start < len(words) and re.fullmatch(r"[A-Z_]+=.*", words[start]):
        start += 1
    return words[start:]


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The module or script that ``words`` run, and its arguments."""
    if words[0] == "metronome":
        assert len(words) > 1, words
        assert words[1] in COMMANDS, words
        return COMMANDS[words[1]], words[2:]
    start = 2 if words[1] == "-m" else 1
    return words[start], words[start + 1 :]


def is_module(name: str) -> bool:
    """Of this repository; an installed copy does not count."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


@functools.cache
def parser_of(program: str) -> argparse.ArgumentParser | None:
    """The parser of a module or script of ours; None where it takes no arguments."""
    name = PROGRAMS.get(program, program.removesuffix(".py").replace("/", "."))
    path = ROOT / f"{name.replace('.', '/')}.py"
    assert path.is_file(), f"{program}: no such program"
    source = path.read_text()
    if not re.search(r"\b(ArgumentParser|CommandLine)\(", source):
        assert "__main__" in source, f"{program}: not a program"
        return None
    module = importlib.import_module(name)
    if hasattr(module, "parser"):
        made = module.parser()
        assert isinstance(made, argparse.ArgumentParser)
        return made
    return parser_inside(module.main)


class Reached(Exception):
    """``parse_args`` was called."""


def parser_inside(main: object) -> argparse.ArgumentParser:
    """The parser that ``main`` makes, which is stopped before it has read anything."""
    found: list[argparse.ArgumentParser] = []

    def stop(cli: argparse.ArgumentParser, *_: object, **__: object) -> None:
        found.append(cli)
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        assert callable(main)
        with pytest.raises(Reached):
            main()
    return found[0]


def flags_of(cli: argparse.ArgumentParser) -> set[str]:
    """Those of its commands, too."""
    flags = set(cli._option_string_actions)
    for action in cli._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags |= {flag for command in action.choices.values() for flag in flags_of(command)}
    return flags


@functools.cache
def bench_flags() -> frozenset[str]:
    """Those that ``bench/conftest.py`` adds to pytest's."""
    return frozenset(re.findall(r'"(--[\w-]+)"', (ROOT / "bench/conftest.py").read_text()))


def overrides_of(program: str) -> tuple[str, ...]:
    """How flags that its parser leaves alone may begin."""
    if program == COMMANDS["train"]:
        from policies.training.trainer import TrainConfig

        return tuple(f"--{field.name}" for field in dataclasses.fields(TrainConfig))
    if program in (COMMANDS["eval-sim"], "eval_sim.py", COMMANDS["latency"]):
        from envs.config import EnvConfig

        return ("--env.KEY", *(f"--env.{field.name}" for field in dataclasses.fields(EnvConfig)))
    return ("--robot.",) if program in (COMMANDS["eval-real"], "eval_real.py") else ()


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
    """What it printed, once it has ended well."""
    try:
        printed, complained = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, f"{printed}\n{complained}"
    return printed, complained


def test_contracts_are_kept_and_the_environment_is_evaluated(folder: Path) -> None:
    """What the pages say one after the other, side by side: most of it is waiting for imports."""
    (words,) = [
        words
        for words, _ in commands(PAGES[1])
        if words[:2] == ["metronome", "eval-sim"] and "mine/reach.yaml" in words
    ]
    options = ("-q", "-p", "no:cacheprovider", "-W", "error", "--rootdir", str(folder))
    with start(folder, "-m", "pytest", *options, "mine") as contracts:
        try:
            script = str(ROOT / "eval_sim.py")
            evaluation, _ = end(start(folder, script, *words[2:], "--videos", "0"))
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
    printed, _ = end(start(folder, "-m", "mine.client"))
    expected = (ROOT / "docs/serve-a-checkpoint.md").read_text()
    shape, transport = printed.strip().splitlines()
    assert f"`{shape}`" in expected
    assert f"`{transport}`" in expected


def test_the_policies_are_what_a_server_would_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from policies.checkpoint.python_factory import load_factory
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


def test_the_refusal_that_documents_quote_is_what_the_shipped_checkpoint_says() -> None:
    """Checked against its contract; the weights are not loaded."""
    import numpy as np

    from policies.errors import ContractMismatch
    from policies.types import CameraContract, MetaObs, PolicyContract
    from runtime.protocol.messages import check_observation_schema, observation_schema

    path = ROOT / "ckpt/act_sim_transfer_cube_scripted_zscore_example/metronome.yaml"
    cameras = tuple(
        CameraContract(**{k: tuple(v) if isinstance(v, list) else v for k, v in keys.items()})
        for keys in yaml.safe_load(path.read_text())["cameras"]
    )
    contract = PolicyContract(
        "act", cameras, state_dim=14, action_dim=14, chunk_size=100, n_action_steps=100
    )
    obs = MetaObs({"top": np.zeros((480, 640, 3), np.uint8)}, np.zeros(14, np.float32))
    with pytest.raises(ContractMismatch) as refusal:
        check_observation_schema(observation_schema(obs), contract)
    for page in (README, PAGES[0]):
        assert f"`{refusal.value}`" in page.read_text().replace("\n", " ")


def test_the_errors_that_documents_quote_are_what_is_raised(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from envs.factory import load_env_config
    from policies.checkpoint.python_factory import load_factory
    from policies.errors import PolicyError
    from policies.yaml_config import InvalidConfig
    from runtime.errors import ModelNameError
    from runtime.options.model_name import read_model_name

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ModelNameError) as no_model:
        read_model_name("nowhere")
    with pytest.raises(PolicyError) as no_factory:
        load_factory("python:mine.policy:mak")
    sample = folder / "mine" / "reach.yaml"
    text = sample.read_text()
    sample.write_text(text.replace("success:", "sucess:"))
    with pytest.raises(InvalidConfig) as no_key:
        load_env_config("mine/reach.yaml")
    sample.write_text(text)
    serve, environment = (page.read_text() for page in PAGES[:2])
    assert f"error: {no_model.value}\n" in serve
    assert f"error: {no_factory.value}\n" in serve
    assert f"error: {no_key.value}\n" in environment


def test_the_reasons_for_a_transport_are_those_of_the_code() -> None:
    reasons = re.findall(r"^\| `(?:shm|zmq)` \| `([^`]+)`", PAGES[0].read_text(), re.MULTILINE)
    assert len(reasons) >= 5
    code = re.sub(r'"\s*"', "", "\n".join(sources()))  # strings over several lines
    missing = [reason for reason in reasons if reason.removeprefix("client: ") not in code]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_samples_are_yaml(page: Path) -> None:
    for sample in fences(page, "yaml"):
        assert isinstance(yaml.safe_load(sample), dict)


def test_the_gateways_samples_are_read_by_the_commands() -> None:
    from policies.yaml_config import parse_config
    from runtime.options.observation_keys import ObservationKeys
    from runtime.server.config import ServerConfig
    from runtime.upstream.contract import UpstreamContract

    samples = fences(ROOT / "docs/clients-of-other-systems.md", "yaml")
    server, keys, contract = map(yaml.safe_load, samples)
    assert parse_config(UpstreamContract, contract, source="page").action_dim == 14
    assert len(parse_config(ServerConfig, server, source="page").gateways) == 3
    assert len(parse_config(ObservationKeys, keys, source="page").cameras) == 2


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_command_and_its_flags_exist(page: Path, folder: Path) -> None:
    for words, whole in commands(page):
        if words[0] == "make":
            check_make(words)
        elif words[0] == "pytest" or words[:3] == ["python", "-m", "pytest"]:
            check_pytest(words[words.index("pytest") + 1 :], folder)
        elif words[0] in ("python", "metronome"):
            program, arguments = program_of(words)
            if not (folder / f"{program.replace('.', '/')}.py").is_file():
                check_program(program, arguments, whole)
        else:
            assert words[0] in (".", "lerobot-calibrate"), words


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+)\s*\?=", makefile, re.MULTILINE))
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        assert name in (variables if equals else targets), words


def check_pytest(arguments: list[str], folder: Path) -> None:
    flags = {word for word in arguments if word.startswith("-")}
    assert flags <= PYTEST_FLAGS | bench_flags(), arguments
    paths = [word for word in arguments if "/" in word]
    assert paths, arguments
    assert all((ROOT / path).exists() or (folder / path).exists() for path in paths), arguments


def check_program(program: str, arguments: list[str], whole: bool) -> None:
    cli = parser_of(program)
    if cli is None:
        assert not arguments, (program, arguments)
        return
    given = [word.partition("=")[0] for word in arguments if re.match(r"-{1,2}[a-zA-Z]", word)]
    unknown = [word for word in given if word not in flags_of(cli)]
    assert all(word.startswith(overrides_of(program)) for word in unknown), (program, unknown)
    if whole:
        try:
            cli.parse_known_args(arguments)
        except SystemExit as refused:
            pytest.fail(f"{program} {shlex.join(arguments)}: exit status {refused.code}")


@pytest.mark.parametrize("program", [*COMMANDS.values(), *PARSED])
def test_every_program_has_help(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli = parser_of(program)
    assert cli is not None
    with pytest.raises(SystemExit) as ended:
        cli.parse_args(["--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_every_command_is_in_the_readme() -> None:
    shown = {words[1] for words, _ in commands(README) if words[0] == "metronome"}
    assert shown == set(COMMANDS)


def test_the_readme_shows_the_test_command() -> None:
    assert "make test" in [" ".join(words) for words, whole in commands(README) if whole]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_flag_exists(page: Path) -> None:
    programs = [*COMMANDS.values(), *PARSED]
    known = {flag for program in programs if (cli := parser_of(program)) for flag in flags_of(cli)}
    known |= bench_flags() | set(overrides_of(COMMANDS["train"])) | OTHERS_FLAGS
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", page.read_text()))
    wrong = {flag for flag in mentioned - known if not flag.startswith(OVERRIDES)}
    assert not wrong


def test_the_page_of_flags_says_what_the_configurations_fields_say() -> None:
    assert flags_page.PAGE.read_text(encoding="utf-8") == flags_page.page()


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_file_and_module_exists(page: Path, folder: Path) -> None:
    for span in spans(page):
        if re.fullmatch(rf"(?:(?:{PACKAGES}|mine)/)[\w./-]*|\w+\.py", span) and "NAME" not in span:
            assert (ROOT / span).exists() or (folder / span).exists(), span
        if re.fullmatch(rf"(?:{PACKAGES})(?:\.\w+)+", span) and not span.endswith(".py"):
            assert is_module(span), span


@functools.cache
def sources() -> list[str]:
    """The text of the code and of its configurations; this file does not count."""
    here = Path(__file__).resolve()
    return [
        path.read_text()
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml") and path.resolve() != here
    ]


@functools.cache
def source_words() -> frozenset[str]:
    return frozenset(word for text in sources() for word in re.findall(r"\w+", text))


def is_composed(word: str) -> bool:
    """Whether the code makes it from its parts: a metric's name, the encoding of a ROS picture."""
    metric = word.removeprefix("metronome_").removesuffix("_total")
    bayer = re.fullmatch(r"bayer_([rgb]{4})(?:8|16)", word)
    return metric in source_words() or (bayer is not None and bayer[1] in source_words())


@functools.cache
def classes() -> dict[str, frozenset[str]]:
    """Every class of the code: its name to the words of its body."""
    found: dict[str, frozenset[str]] = {}
    for text in sources():
        for name, body in re.findall(
            r"^class (\w+)(.*?)(?=^[\w@\"]|\Z)", text, re.MULTILINE | re.DOTALL
        ):
            found[name] = found.get(name, frozenset()) | frozenset(re.findall(r"\w+", body))
    return found


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_class_and_identifier_exists(page: Path) -> None:
    own = frozenset(re.findall(r"\w+", "\n".join(fences(page, "python") + fences(page, "yaml"))))
    for span in spans(page):
        called = re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", span)
        if called is None:
            continue
        first, *rest = called[1].split(".")
        if re.match(r"[A-Z]\w*[a-z]", first) and first not in OTHERS_CLASSES:
            upstream = first.endswith("Manager") and first in source_words()  # ILStudio's names
            assert upstream or first in classes() or first in own, span
            assert all(word in classes()[first] for word in rest if first in classes()), span
        elif "_" in called[1]:
            parts = {word for word in (first, *rest) if "_" in word}
            missing = parts - source_words() - own - OTHERS_WORDS
            assert not {word for word in missing if not is_composed(word)}, span


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_documents_use_standard_terms(page: Path) -> None:
    found = re.findall(rf"\b(?:{'|'.join(PRIVATE_WORDS)})\b", page.read_text(), re.IGNORECASE)
    assert not found


def test_renamed_modules_are_where_the_changelog_says() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| (`[^|]+`) \|$", CHANGELOG.read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for old, new in rows:
        for name in re.findall(rf"`(?:python -m )?((?:{PACKAGES})(?:\.\w+)+)`", new):
            assert is_module(name), name
        for name in re.findall(r"`metronome ([\w-]+)`", new):
            assert name in COMMANDS, name
        for name in re.findall(rf"`(?:python -m )?((?:{PACKAGES})(?:\.\w+)+)`", old):
            path = ROOT / name.replace(".", "/")
            assert not path.with_suffix(".py").exists(), name


@pytest.mark.parametrize(
    "page", [*DOCUMENTS, CHANGELOG], ids=lambda page: f"{page.parent.name}-{page.stem}"
)
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
