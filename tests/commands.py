"""Commands of the CLI in this process, and what one that refuses its options looks like."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from ttrouting.cli import app


def invoke(*arguments: str) -> Any:
    """A finished command; what it did not mean to raise is raised."""
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def assert_refused(done: Any, words: str) -> None:
    """One line on stderr that says `words`, nothing on stdout, exit code 2."""
    assert done.exit_code == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
