"""The parts of a fleet that need no cluster."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from runtime.fleet import folder_transfer, package_stamp
from runtime.fleet.cluster import Node, check_stamp
from runtime.fleet.errors import FleetError
from runtime.fleet.folder_transfer import IncomingFolder, OutgoingFolder
from runtime.fleet.placement import nearest_server, node_for_server


def test_servers_start_on_one_node_each_first() -> None:
    nodes = [Node("small", "", 2, 0), Node("big", "", 8, 0), Node("gpu", "", 4, 2)]
    taken: Counter[str] = Counter()
    for expected in ("gpu", "big", "small", "gpu"):
        node = node_for_server(nodes, taken, gpus=0)
        assert node is not None
        assert node.node_id == expected
        taken[node.node_id] += 1
    first = node_for_server(nodes, Counter({"gpu": 3}), gpus=0.5)
    assert first is not None
    assert first.node_id == "gpu"
    assert node_for_server(nodes, taken, gpus=3) is None
    assert node_for_server(nodes, Counter({"gpu": 2}), gpus=1) is None


def test_a_worker_asks_the_server_of_its_node_then_the_least_loaded() -> None:
    servers = {"a": "node 1", "b": "node 2", "c": "node 2"}
    load = Counter({"a": 5, "b": 2, "c": 1})
    assert nearest_server("node 1", servers, load) == "a"
    assert nearest_server("node 2", servers, load) == "c"
    assert nearest_server("node 3", servers, load) == "c"
    assert nearest_server("node 3", {}, load) is None


def test_a_worker_keeps_its_server_unless_another_is_better() -> None:
    servers = {"a": "node 1", "b": "node 2"}
    assert nearest_server("node 3", servers, Counter({"a": 2, "b": 1}), own="a") == "a"
    assert nearest_server("node 3", servers, Counter({"a": 3, "b": 1}), own="a") == "b"
    assert nearest_server("node 2", servers, Counter({"a": 1, "b": 9}), own="a") == "b"
    assert nearest_server("node 2", {"a": "node 1"}, Counter({"b": 1}), own="b") == "a"


def test_files_arrive_as_they_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_transfer, "CHUNK_BYTES", 4)
    outgoing = OutgoingFolder()
    files = {"output/a/long": b"0123456789", "output/empty": b"", "dataset/b": b"four"}
    for name, content in files.items():
        path = outgoing.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    incoming = IncomingFolder(tmp_path)
    for part in outgoing.parts():
        incoming.write(part, outgoing.read(part))
    arrived = {str(name): (incoming.path / name).read_bytes() for name in incoming.files()}
    assert arrived == files
    outgoing.clear()
    assert outgoing.parts() == ()
    outgoing.remove()
    incoming.remove()
    assert not outgoing.path.exists()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_killed_workers_are_removed() -> None:
    first = OutgoingFolder()
    left = first.path.with_name("metronome-fleet-999999999-left")
    left.mkdir()
    second = OutgoingFolder()
    assert not left.exists()
    assert first.path.exists()
    first.remove()
    second.remove()


def test_other_sources_are_refused_with_both() -> None:
    ours = package_stamp.package_stamp()
    version, digest, _, folder = ours.split(" ", maxsplit=3)
    check_stamp("10.0.0.2", f"{version} {digest} in /elsewhere")
    theirs = f"{version} {digest[::-1]} in {folder}"
    with pytest.raises(FleetError) as caught:
        check_stamp("10.0.0.2", theirs)
    assert f"node 10.0.0.2: got this package as {theirs}, expected {ours}" in str(caught.value)
