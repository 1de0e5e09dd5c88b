"""Policies of the Hugging Face hub, named ``hf:ORG/NAME[@REVISION]``.

The hub's own library downloads and keeps them; its cache, its tokens and its environment variables
(``HF_HOME``, ``HF_HUB_OFFLINE``) apply. Only JSON, YAML and safetensors files are downloaded: no
pickles and no code.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from runtime.errors import ModelNameError

PREFIX = "hf:"
FORM = "hf:ORG/NAME[@REVISION]"
ALLOWED = ("*.json", "*.yaml", "*.safetensors")
"""Files that are downloaded, in any folder of the repository."""
DEFAULT_BRANCH = "main"
_NAME = re.compile(r"hf:(?P<repository>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^@\s]+))?")


def snapshot_folder(text: str, *, fixed_revision: bool = False) -> Path:
    """Return the local folder of the policy that ``text`` names; download what is missing.

    The same name gives the same folder for the life of the process, also if a branch moves.

    Args:
        text: ``hf:ORG/NAME``, or with ``@`` and a commit hash, a tag or a branch.
        fixed_revision: Refuse a name without a revision and the default branch: what it names may
            change from one day to the next.

    Raises:
        ModelNameError: Not such a name, the library is missing, no such repository or revision, no
            connection, or no safetensors file.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise ModelNameError(f"-m {text!r}: got no name of the Hugging Face hub, expected {FORM}")
    repository, revision = match["repository"], match["revision"] or DEFAULT_BRANCH
    if fixed_revision and revision == DEFAULT_BRANCH:
        raise ModelNameError(
            f"-m {text!r}: got {'no revision' if match['revision'] is None else 'a branch'}, "
            f"expected {PREFIX}{repository}@ with a commit hash or a tag: on a robot the policy "
            "must not change with its repository"
        )
    return download(repository, revision)


@functools.cache
def download(repository: str, revision: str) -> Path:
    """Return the local folder of a repository at a revision; as ``snapshot_folder``, once."""
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise ModelNameError(
            f"-m {PREFIX}{repository}: {error}; expected the hub's library: pip install '.[hub]'"
        ) from error
    where = f"-m {PREFIX}{repository}@{revision}"
    cache = Path(constants.HF_HUB_CACHE)
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=list(ALLOWED))
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub was not reached"
        known = _cached_revisions(cache / f"models--{repository.replace('/', '--')}")
        raise ModelNameError(
            f"{where}: got no complete copy in {cache}, and {why}; expected a connection, or one "
            f"of the revisions there: {', '.join(known) or 'none'}"
        ) from error
    except Exception as error:  # the library passes on any error of its HTTP client
        lines = [line for line in str(error).splitlines() if line] or [repr(error)]
        raise ModelNameError(
            f"{where}: {' '.join(lines[:2])}; expected a repository and a revision of the hub "
            "that you may read"
        ) from error
    folder = Path(found)
    if not any(folder.rglob("*.safetensors")):
        raise ModelNameError(
            f"{where}: got no safetensors file, expected model.safetensors: pickled weights (.bin, "
            ".ckpt, .pt, .pkl) of the hub are neither downloaded nor opened"
        )
    return folder


def _cached_revisions(folder: Path) -> list[str]:
    """Return the branches, tags and commits that the hub's cache has of a repository."""
    refs = folder / "refs"
    names = [str(path.relative_to(refs)) for path in sorted(refs.rglob("*")) if path.is_file()]
    return names + sorted(path.name for path in folder.glob("snapshots/*"))
