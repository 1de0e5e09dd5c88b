"""How late a control tick is: ours, the peers' pacing and cyclictest, in alternating blocks.

Short by default. ``pytest bench/test_jitter.py --long`` runs what the published figures were made
with: at least 10,000 ticks a way at 50 Hz, in blocks of 60 s; or, in pieces,
``python -m bench.pacing.measure``. What ``bench.sample_files`` keeps of the samples lies beside the
other results, with the picture.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.pacing.load import LOADS, load
from bench.pacing.measure import RATES, STEM, group_of, measure
from bench.pacing.picture import PICTURE, draw
from bench.records import Records
from bench.sample_files import FINE

SHORT_BLOCK_S, LONG_BLOCK_S, LONG_ROUNDS = 0.6, 60.0, 4


@pytest.fixture(scope="module", params=LOADS)
def under(request: pytest.FixtureRequest) -> Iterator[str]:
    """The load, started once for all rates."""
    with load(request.param):
        yield request.param


@pytest.fixture(scope="module", autouse=True)
def _picture(records: Records, pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    if pytestconfig.getoption("--long"):
        draw(records, PICTURE)


@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("hz", RATES)
def test_lateness(hz: int, under: str, records: Records, pytestconfig: pytest.Config) -> None:
    long = pytestconfig.getoption("--long")
    measure(
        records,
        hz,
        under,
        block_s=LONG_BLOCK_S if long else SHORT_BLOCK_S,
        rounds=LONG_ROUNDS if long else 1,
        under_load=True,
    )
    ours = f"{group_of(hz, under)}/ours, spin"
    assert abs(records.values[f"{ours}: drift, ticks"]) < 0.5
    if long:
        records.save(STEM, group_of(hz, under), growth=FINE)
