"""Names: what was replaced stays gone, and no two public classes share one name."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("runtime", "transport", "policies", "envs", "robots")
OLD_NAMES = """
    ANCESTORS Answering Attendance Awake Body Core Costs Door Footage Guardian InFlight Link
    Loader Mailbox Member MemberFailed Mission Operator OperatorToken Pace Pilot Playback Reactor
    Roster Router Served ServedModel ServerChild Service Unfit Wishes Word
"""
OLD_MODULES = {
    "envs": "meta",
    "policies": "compiled",
    "policies/act": "makers parity",
    "policies/checkpoint": "standins",
    "robots": "compiled processes",
    "runtime": """
        admission answering attendance blending cells checkpoint_options child clock config core
        costs crew ctl demo episode executor fitting footage frames guardian inflight interpolation
        keys latency loop mailbox messages metrics mission model_name operator operator_token
        overrides pace pilot playback plots realtime recording replay results rollouts scheduler
        sensing serve served served_model service session strategy_choice stream supervisor swap top
        trace_file trace_memory train video warmup wishes
    """,
    "transport": """
        adaptive atomics auto awake control curve door greeting handshake heap join layout link
        listener offer reactor ring roster router sessions shm_channel staging steps views window
        zmq
    """,
}
"""Modules that moved or were renamed, by the folder they were in."""
NOT_OURS = re.compile(r"\bLoader=|ov\.Core|bench/peers/|tests/fuzz/corpus")
"""yaml's keyword argument; other projects' names; recorded inputs."""


def texts() -> Iterator[tuple[str, str]]:
    """Every line that people read: (``path:line``, text)."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.yaml", "*.toml", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in listed:
        path = ROOT / name
        if path == Path(__file__) or name == "CHANGELOG.md" or not path.exists():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not NOT_OURS.search(line) and not NOT_OURS.search(name):
                yield f"{name}:{number}", line


def test_replaced_names_and_module_paths_do_not_come_back() -> None:
    paths = [
        re.escape(f"{folder}/{module}").replace("/", "[./]")
        for folder, modules in OLD_MODULES.items()
        for module in modules.split()
    ]
    names = re.compile(rf"(?<!\w)({'|'.join(OLD_NAMES.split())})(?!\w)")
    modules = re.compile(rf"(?<![\w./])({'|'.join(paths)})(?=\.py\b|[^\w./]|\.\s|\.$|$)")
    found = [
        f"{where}: {match[0]}: {line.strip()}"
        for where, line in texts()
        for match in (*names.finditer(line), *modules.finditer(line))
    ]
    assert not found, "\n".join(found)


def test_no_two_public_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for package in PRODUCT:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes[node.name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_runtime_and_transport_are_folders_not_heaps() -> None:
    assert len(list((ROOT / "runtime").glob("*.py"))) <= 4
    assert len(list((ROOT / "transport").glob("*.py"))) <= 14
