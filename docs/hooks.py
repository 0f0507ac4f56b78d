"""What the site needs beside its pages, which are to read well where they lie too."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Diagrams become part of the page, so that they take its colours; files outside `docs/` lose their links."""
    markdown = re.sub(r"!\[[^\]]*\]\((diagrams/\w+\.svg)\)", lambda found: _inline(found[1]), markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./(?:demos|strategies|tests|ttrouting)/[^)]*\)", r"\1", markdown)


def _inline(name: str) -> str:
    """An SVG without the colours that it has by itself; no empty line, which would end the block."""
    svg = re.sub(r"<style>.*?</style>", "", (DOCS / name).read_text(), flags=re.DOTALL)
    return "\n".join(line for line in svg.splitlines() if line.strip())
