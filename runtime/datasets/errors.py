"""The exceptions of datasets."""

from __future__ import annotations

from runtime.errors import RuntimeFault


class DatasetError(RuntimeFault):
    """A dataset cannot be read, continued or written; the message has its folder."""


class RecorderFailed(DatasetError):
    """An episode could not be recorded. Those before are in the dataset."""
