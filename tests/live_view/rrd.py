"""Reads an .rrd file with Rerun's own reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


class RrdFile:
    """A finished file."""

    def __init__(self, path: Path) -> None:
        dataframe = pytest.importorskip("rerun.dataframe")
        self._recording = dataframe.load_recording(str(path))
        self.timelines = [column.name for column in self._recording.schema().index_columns()]
        columns = self._recording.schema().component_columns()
        self.entities = {column.entity_path for column in columns}

    def rows(self, entity: str, component: str) -> tuple[np.ndarray, list]:
        """The times in ns and what the component was then."""
        view = self._recording.view(index="time", contents=entity)
        table = view.select().read_all()
        (name,) = (name for name in table.column_names if name.endswith(f":{component}"))
        return np.asarray(table["time"].cast("int64")), table[name].to_pylist()

    def scalars(self, entity: str) -> tuple[np.ndarray, np.ndarray]:
        """The times in ns and the values of a series."""
        times_ns, values = self.rows(entity, "scalars")
        return times_ns, np.array([value for (value,) in values])

    def joints(self, kind: str, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The times of ``kind`` (commanded, measured, planned), and (n, joints) its values."""
        series = [self.scalars(f"/joints/{name}/{kind}") for name in names]
        for times_ns, _ in series:
            np.testing.assert_array_equal(times_ns, series[0][0])
        return series[0][0], np.stack([values for _, values in series], axis=1)

    def texts(self) -> list[str]:
        """The lines, in order."""
        return [line for (line,) in self.rows("/log", "text")[1]]
