"""Which sources of this package a process runs, to compare those of a cluster's nodes.

Sent to the nodes by value, because a node may have another version or none. It therefore imports
the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
from importlib import metadata
from pathlib import Path

PACKAGES = ("runtime", "transport", "policies", "envs", "robots")


def package_stamp() -> str:
    """Return version, hash of all sources and folder of the package that this process imports.

    The first two words are equal if and only if the sources are.
    """
    try:
        version = metadata.version("metronome")
    except metadata.PackageNotFoundError:
        version = "uninstalled"
    digest = hashlib.sha256()
    found = ""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return f"no package {name}"
        folder = Path(spec.origin).parent
        found = found or str(folder.parent)
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{name}/{path.relative_to(folder)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"{version} {digest.hexdigest()[:12]} in {found}"


def same_sources(one: str, other: str) -> bool:
    """Return whether two results of ``package_stamp`` are of equal sources, in any folder."""
    return one.partition(" in ")[0] == other.partition(" in ")[0]
