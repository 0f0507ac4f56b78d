"""`ttrouting inspect`: which experts did a prompt meet, and what did strategies change about that?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import ttrouting as ttr
from ttrouting.cli.generate import templated, versions
from ttrouting.cli.models import POCKET, downloads, encode, load_model
from ttrouting.cli.options import (
    Adapt,
    Debug,
    Device,
    Dtype,
    DtypeName,
    Escapes,
    Files,
    Json,
    Load,
    ModelName,
    NoHarm,
    Settings,
)
from ttrouting.cli.output import Output
from ttrouting.cli.settings import make_strategies
from ttrouting.cli.texts import gather
from ttrouting.errors import ConfigError
from ttrouting.inspection.record import Inspection, inspect_prompt
from ttrouting.inspection.terminal import TerminalView
from ttrouting.trace import RoutingTrace


def command(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="One prompt; '-' reads it from stdin.", show_default=False),
    ] = None,
    adapt: Adapt = None,
    settings: Settings = None,
    load: Load = None,
    no_harm: NoHarm = True,
    model: ModelName = POCKET,
    file: Files = None,
    escapes: Escapes = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that the adapted model writes, greedily, and that are traced too.")
    ] = 0,
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            "--trace",
            metavar="DIR",
            help="Show a saved trace and load no model; given twice, the first one is base.",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write one HTML page.")] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Also write a picture.")] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="DIR", help="Also save the traces, as DIR/base and DIR/adapted."),
    ] = None,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Trace the routing of a prompt per token, layer and expert, as the model is and under strategies.

    Example: ttrouting inspect -e "Q: 12+30\\nA:" --adapt dynamic_k --set dynamic_k.p=0.5 --html page.html
    """
    output = Output(as_json)
    _check_places(html, png, save)
    texts = gather(prompt or [], file or [], escapes)
    if trace:
        if texts or adapt or load or save:
            raise ConfigError("--trace shows what was saved. Leave prompt, --adapt, --load and --save out.")
        found = _saved(trace)
    else:
        if len(texts) != 1:
            raise ConfigError(f"Give one prompt (as an argument, with --file, or '-' for stdin); got {len(texts)}.")
        strategies = make_strategies(adapt or [], settings or [], load or [])
        with output.waiting(f"loading {model}", downloads(model)) as say:
            loaded, tokenizer = load_model(model, dtype.value, device)
            inputs = encode(loaded, tokenizer, *templated(tokenizer, texts, chat))
            title = f"{model}: {' + '.join(s.name for s in strategies) or 'as it is'}"
            with ttr.adapt(loaded, strategies, no_harm=no_harm, tokenizer=tokenizer) as adapted:
                say("tracing")
                found = inspect_prompt(adapted, tokenizer, inputs, max_new_tokens, title)
    files = _write(found, html, png, save)
    output.show(TerminalView(found))
    for written in files:
        output.note(f"Written: {written}")
    output.data({"model": None if trace else model, **_facts(found), "files": files, "versions": versions()})


def _saved(folders: list[Path]) -> Inspection:
    if len(folders) > 2:
        raise ConfigError(f"--trace takes one trace, or base and adapted; got {len(folders)}.")
    traces = [ttr.load(folder) for folder in folders]
    for folder, found in zip(folders, traces, strict=True):
        if not isinstance(found, RoutingTrace):
            raise ConfigError(f"{folder} holds no trace. Give a folder that 'ttrouting inspect --save' wrote.")
    return Inspection(" and ".join(map(str, folders)), *traces)


def _check_places(html: Path | None, png: Path | None, save: Path | None) -> None:
    """Find out before a model is loaded whether files can be written."""
    for option, file in (("--html", html), ("--png", png)):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            what = "is a folder" if file.is_dir() else f"cannot be written: there is no folder {file.parent}"
            raise ConfigError(f"{file} {what}. Give {option} a file in a folder that is there.")
    if save is not None and save.exists() and not save.is_dir():
        raise ConfigError(f"{save} is a file. Give --save a folder, or a name that is free.")
    if png is not None:
        from ttrouting.evaluation.report.canvas import need_matplotlib

        need_matplotlib("--png", "viz")


def _write(found: Inspection, html: Path | None, png: Path | None, save: Path | None) -> list[str]:
    """Write what was asked for; the paths of it."""
    written: list[Path] = []
    if save is not None:
        written += [ttr.save(save / name, one) for name, one in _traces(found).items()]
    if html is not None:
        from ttrouting.inspection.page import write_page

        written.append(write_page(found, html))
    if png is not None:
        from ttrouting.inspection.picture import write_picture

        written.append(write_picture(found, png))
    return [str(path) for path in written]


def _traces(found: Inspection) -> dict[str, RoutingTrace]:
    return {"base": found.base} | ({} if found.adapted is None else {"adapted": found.adapted})


def _facts(found: Inspection) -> dict[str, Any]:
    difference = found.difference
    return {
        "title": found.title,
        "tokens": found.base.tokens,
        "prompt_tokens": found.base.prompt_tokens,
        "layers": found.base.layers,
        "num_experts": found.base.num_experts,
        "traces": {
            name: {
                "load": trace.load.tolist(),
                "k": trace.k.tolist(),
                "entropy": None if trace.entropy is None else trace.entropy.tolist(),
            }
            for name, trace in _traces(found).items()
        },
        "changes": [] if difference is None else [asdict(change) for change in difference.layers()],
        "next_tokens": [asdict(token) for token in found.next_tokens],
        "report": found.report.to_dict(),
    }
