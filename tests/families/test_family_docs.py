"""docs/families.md is what the matrix wrote, and is not out of date."""

from __future__ import annotations

from pathlib import Path

import pytest

import ttrouting as ttr
from tests.families.expected import CHECKS, EXPECTED, REFUSED
from tests.families.table import COMMAND

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(scope="module")
def page(request: pytest.FixtureRequest) -> str:
    if request.config.getoption("--families-table", default=None):
        pytest.skip("the page is being written")
    assert PAGE.exists(), f"write it with: {COMMAND}"
    return PAGE.read_text()


def rows(text: str) -> dict[str, str]:
    """Lines of a table by their first cell."""
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}


def test_every_family_is_listed_with_what_is_expected(page):
    above, _, below = page.partition("## Checks")
    found, checks = rows(above), rows(below)
    for family, expected in EXPECTED.items():
        row = found[f"`{family}`"]
        assert f"| {expected.experts}, {expected.top_k} |" in row
        assert f"| {expected.scoring}" in row
        assert f"| {expected.dtype} |" in row
        marks = [cell.strip() for cell in checks[f"`{family}`"].split("|")[2:-1]]
        assert len(marks) == len(CHECKS)
        assert all(mark[0] in "✓–" for mark in marks), f"{family}: write the page anew: {COMMAND}"


@pytest.mark.parametrize("family", [name for name, expected in EXPECTED.items() if expected.limits])
def test_limits_are_those_of_today(family, page, model):
    for limit in dict.fromkeys(limit for site in ttr.find_sites(model(family)) for limit in site.limits):
        assert f"- `{family}`: {limit}." in page, f"write the page anew: {COMMAND}"


@pytest.mark.parametrize("family", REFUSED)
def test_refusals_are_listed(family, page):
    line = next(line for line in page.splitlines() if line.startswith(f"- `{family}`:"))
    assert all(words in line for words in REFUSED[family])
