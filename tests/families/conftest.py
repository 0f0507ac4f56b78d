"""Fixtures of the family matrix, and the table of its results.

    pytest tests/families --families-table docs/families.md

writes the table. Results travel as report properties, so that this works under pytest-xdist too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.families.expected import CHECKS
from tests.families.harness import built, fingerprint
from tests.families.table import Results, write


class TablePlugin:
    """Collects what passed and writes the table when everything has run."""

    def __init__(self, target: str | None) -> None:
        self.target = target
        self.results = Results()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        properties = [value for name, value in report.user_properties if name == "family"]
        if properties:
            (family, check), *notes = properties
            self.results.add(family, check, report.outcome, notes)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.target and not hasattr(session.config, "workerinput"):  # an xdist worker sees only a part
            write(self.results, Path(self.target))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-table", metavar="FILE", help="write what the family matrix found as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "check(name): which column of the family matrix a test fills")
    config.pluginmanager.register(TablePlugin(config.getoption("--families-table", default=None)))
    transformers.logging.set_verbosity_error()  # hints about faster kernels


@pytest.fixture(autouse=True)
def _say_which(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    marker = request.node.get_closest_marker("check")
    if marker is not None:
        assert marker.args[0] in CHECKS
        record_property("family", [request.node.callspec.params["family"], marker.args[0]])


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """What the table says if the test passes.

    `note(reason)`: a dash and the reason. `note(remark=...)`: a tick and the remark. `note(fact=value)`: a
    fact about the family.
    """

    def write_down(reason: str | None = None, **facts: Any) -> None:
        record_property("family", {"reason": reason, **facts})

    return write_down


@pytest.fixture
def model() -> Iterator[Callable[..., Any]]:
    """Builds or reuses a model; afterwards nothing of it may have changed."""
    used: list[tuple[Any, dict[str, Any], str]] = []

    def get(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        found: Any = built(family, dtype, tuple(changes.items()))
        used.append((found, fingerprint(found), found.config._experts_implementation))
        return found

    yield get
    for found, before, implementation in used:
        if found.config._experts_implementation != implementation:
            found.set_experts_implementation(implementation)
        after = fingerprint(found)
        changed = [name for name in before if before[name] != after.get(name)]
        if changed:
            built.cache_clear()  # the next test starts from a clean model
        assert not changed, f"left a trace in {changed}"
