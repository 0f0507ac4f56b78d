"""The `ttrouting` command: `ttrouting.cli:main` is what the installed script calls."""

from ttrouting.cli.entry import app, main

__all__ = ["app", "main"]
