"""`ttrouting calibrate`: which threshold of dynamic-k gives a wanted mean number of experts on a text?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

import ttrouting as ttr
from ttrouting.artefacts import MANIFEST
from ttrouting.cli.generate import versions
from ttrouting.cli.models import POCKET, downloads, load_model
from ttrouting.cli.options import Debug, Device, Dtype, DtypeName, Escapes, Files, Json, ModelName, Settings
from ttrouting.cli.output import Output
from ttrouting.cli.settings import read_settings, typed_options
from ttrouting.cli.texts import gather
from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.pocket.skills import sample, trained_pairs
from ttrouting.registry import get_strategy

POCKET_TEXTS = 2  # solved questions of each trained skill and dialect


def command(
    *,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to calibrate on; '-' reads one from stdin.", show_default=False),
    ] = None,
    mean_k: Annotated[float, typer.Option("--mean-k", help="Wanted experts per token, mean over layers.")],
    rule: Annotated[str, typer.Option(help="top_p, relative, sensitivity or entropy.")] = "top_p",
    tolerance: Annotated[float, typer.Option(min=1e-6, help="Largest distance from the wanted mean.")] = 0.02,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to save the strategy, for --load.")
    ] = None,
    model: ModelName = POCKET,
    file: Files = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a text is a text of its own.")] = False,
    escapes: Escapes = False,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the dynamic_k threshold that meets a mean number of experts per token on given text.

    Each text is cut to the model's context. Without a text the pocket model uses its own reference questions.

    Example: ttrouting calibrate --mean-k 1.5 --out k15; ttrouting generate "..." --load k15
    """
    output = Output(as_json)
    given = gather(texts or [], file or [], escapes)
    if lines:
        given = [line for text in given for line in text.splitlines() if line.strip()]
    if not given:
        if model != POCKET:
            raise ConfigError("No text to calibrate on. Give texts as arguments, with --file, or '-' for stdin.")
        given = pocket_texts()
    if out is not None and out.exists() and not (out / MANIFEST).is_file() and (out.is_file() or any(out.iterdir())):
        # `save` would refuse as well, but only after the work
        raise ArtefactError(f"{out} exists and was not written by ttr.save. Choose another path for --out.")
    options = read_settings(settings or [])
    kind = get_strategy("dynamic_k")
    other = next((name for name in options if name != kind.name), None)
    if other is not None:
        raise ConfigError(f"--set {other}...: calibrate takes options of {kind.name} only.")
    typed = typed_options(kind, options.get(kind.name, {}))
    if "rule" in typed:
        rule = typed.pop("rule")
    with output.waiting(f"loading {model}", downloads(model)) as say:
        loaded, tokenizer = load_model(model, dtype.value, device)
        say(f"looking for the threshold on {len(given)} texts")
        found = ttr.calibrate(loaded, tokenizer, given, mean_k, rule, tolerance, **typed)
    seen = found.calibration
    if seen is None:
        raise ConfigError(f"calibrate returned {found!r} without a calibration.")
    knob = {"relative": "beta", "sensitivity": "threshold"}.get(rule, "p")
    output.text(
        f"dynamic_k.rule={rule}  dynamic_k.{knob}={getattr(found, knob):.6g}\n"
        f"experts per token {seen.mean_k:.3f}, asked for {mean_k:g}: {seen.tokens} tokens in {len(given)} texts\n"
        f"next-token KL from the model itself: mean {seen.kl:.4f} nats, 95th percentile {seen.kl_high:.4f}"
    )
    if out is not None:
        folder = ttr.save(out, found)
        output.note(f"Saved in {folder}. Use it: ttrouting generate PROMPT --load {folder}")
    output.data(
        {
            "model": model,
            "strategy": found.to_dict(),
            "calibration": dataclasses.asdict(seen),
            "texts": len(given),
            "out": None if out is None else str(out),
            "versions": versions(),
        }
    )


def pocket_texts() -> list[str]:
    """Solved questions of the reference split, of everything that the pocket model was trained on."""
    return [
        "".join(example.prompt + example.completion for example in sample(skill, dialect, "reference", POCKET_TEXTS))
        for skill, dialect in trained_pairs()
    ]
