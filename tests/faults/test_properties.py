"""T1 to T24 with the counts of the default suite; ``make faults`` runs the long ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.harness import Tally
from tests.faults.table import PAGES, RESULTS, ROWS, Row, markdown, run_row


@pytest.mark.parametrize("row", [row for row in ROWS if row.small], ids=lambda row: row.name)
def test_property(row: Row) -> None:
    tally = run_row(row, row.small)
    assert tally.run > 0 and tally.passed == tally.run, "\n".join(tally.problems)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_property_with_its_long_count(row: Row) -> None:
    tally = run_row(row, row.long)
    assert tally.run > 0 and tally.passed == tally.run, "\n".join(tally.problems)


def test_a_case_that_fails_is_counted_and_told() -> None:
    tally = Tally()
    with tally.case("good"):
        pass
    with tally.case("bad"):
        raise ValueError("two\nlines")
    assert (tally.run, tally.passed) == (2, 1)
    assert tally.problems == [f"bad: ValueError at test_properties.py:{_line('raise ValueError')}: two | lines"]


def _line(text: str) -> int:
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_shows_the_table_of_the_results_file(page: Path) -> None:
    assert markdown(json.loads(RESULTS.read_text())) in page.read_text(encoding="utf-8")
