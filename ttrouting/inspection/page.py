"""How is an inspection one HTML page that needs nothing else, and stays quick with thousands of tokens?

The traces go into the page as bytes; its script draws them on canvases, one pixel a cell.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttrouting.cli.output import plain
from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.evaluation.report.page import stylesheet
from ttrouting.inspection.record import Inspection
from ttrouting.inspection.terminal import summary
from ttrouting.trace import RoutingTrace

MOST_TOKENS = 16_000  # wider canvases are refused by some browsers


def write_page(found: Inspection, file: Path) -> Path:
    """Write the page.

    Raises:
        ConfigError: more tokens than a browser draws. ArtefactError: it cannot be written there.
    """
    if len(found.base.tokens) > MOST_TOKENS:
        raise ConfigError(
            f"A page shows up to {MOST_TOKENS} tokens, this trace has {len(found.base.tokens)}. Leave --html out, "
            "or shorten the prompt."
        )
    try:
        file.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise ArtefactError(f"Cannot write {file}: {error.strerror}. Give another --html.") from None
    return file


def page(found: Inspection) -> str:
    """The whole page."""
    parts = {
        "title": escape(found.title),
        "style": stylesheet() + _own("page.css"),
        # nothing in a text can end the element that holds it
        "facts": json.dumps(plain(_facts(found)), separators=(",", ":")).replace("<", "\\u003c"),
        "script": _own("maps.js") + _own("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _own("page.html"))


def _own(name: str) -> str:
    return files("ttrouting.inspection").joinpath(name).read_text(encoding="utf-8")


def _facts(found: Inspection) -> dict[str, Any]:
    base, difference = found.base, found.difference
    return {
        "summary": summary(found),
        "tokens": base.tokens,
        "prompt_tokens": base.prompt_tokens,
        "layers": base.layers,
        "num_experts": base.num_experts,
        "base": _arrays(base),
        "adapted": None if found.adapted is None else _arrays(found.adapted),
        "changes": [] if difference is None else [asdict(change) for change in difference.layers()],
        "curves": [asdict(curve) for curve in found.curves],
        "next_tokens": [asdict(token) for token in found.next_tokens],
    }


def _arrays(trace: RoutingTrace) -> dict[str, Any]:
    return {
        "ids": _bytes(trace.ids.to(torch.int16)),
        "weights": None if trace.weights is None else _bytes(trace.weights.float()),
        "entropy": None if trace.entropy is None else _bytes(trace.entropy.float()),
        "k": trace.ids.shape[-1],
    }


def _bytes(array: Tensor) -> str:
    """Little-endian, as typed arrays of browsers are on every machine that runs one."""
    values = array.contiguous().numpy()
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()
