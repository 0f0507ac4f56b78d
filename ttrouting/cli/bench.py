"""`ttrouting bench`: what does a strategy cost beside the bare model, a straightforward version, and a bound?"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from ttrouting.cli import bench_vllm
from ttrouting.cli.generate import versions
from ttrouting.cli.models import POCKET, downloads, find_device, load_model
from ttrouting.cli.options import Debug, Device, Dtype, DtypeName, Files, Json, ModelName, NoHarm, Settings
from ttrouting.cli.output import Output
from ttrouting.cli.settings import make_strategies, read_settings
from ttrouting.cli.texts import gather
from ttrouting.errors import ConfigError
from ttrouting.strategy import Strategy

if TYPE_CHECKING:
    from ttrouting.bench.measure import Spread
    from ttrouting.bench.run import Comparison, Result

STRATEGIES = ["rerouting", "scmoe", "dynamic_k"]  # those that have a straightforward version to compare with
MIB = 1 << 20


class Timer(StrEnum):
    """Which clock times are read from."""

    WALL = "wall"
    CPU = "cpu"


def command(
    model: ModelName = POCKET,
    random: Annotated[
        list[str] | None,
        typer.Option(
            "--random",
            metavar="SPEC",
            help="A random model instead, FAMILY:LAYERSxHIDDEN[:OPTIONS], such as olmoe:8x512:experts=32,vocab=8000.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Prompt lengths in tokens. [default: 128, with --vllm 64]", show_default=False
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Batch sizes; with --vllm requests at a time. [default: 1, with --vllm 1,8,32,128]",
            show_default=False,
        ),
    ] = None,
    adapt: Annotated[
        list[str] | None,
        typer.Option(
            "--adapt",
            "-a",
            metavar="NAME",
            help="A strategy, or several with commas that work together; once for each to be measured. "
            f"[default: {', '.join(STRATEGIES)}]",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="NAME.OPTION=V,V,...",
            help="Measure a strategy with each of these values, such as rerouting.layers=last:2,last:5,all.",
            show_default=False,
        ),
    ] = None,
    no_harm: NoHarm = True,
    file: Files = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each sequence.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions, in each of which all versions take turns.")] = 5,
    clock: Annotated[
        Timer, typer.Option(help="wall, or cpu: what processors worked, steadier where others use them too.")
    ] = Timer.WALL,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights and prompts, and of the order of turns.")] = 0,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the ratios: .png, .svg or .pdf.")] = None,
    vllm: Annotated[
        bool,
        typer.Option(
            "--vllm", help="vLLM's throughput and latency with the plugin and without, none to all adapted."
        ),
    ] = False,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="With --vllm: an argument of vllm.LLM, such as enforce_eager=true."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time to the first token, time a decode step and peak memory, as ratios with median and quartiles.

    Compared with the bare model's generate and with a straightforward version of the paper, in the same repetitions.
    Prompts are random tokens, or cut from the texts of --file.

    With --vllm: throughput and latency of requests that come at the same time, with the plugin and without it.

    Example: ttrouting bench --random olmoe:8x512 --prompt 64,512 --batch 1,8 -a rerouting -a scmoe
    """
    output = Output(as_json)
    if vllm:
        given = {
            "--vary": bool(vary),
            "--file": bool(file),
            "--plot": plot is not None,
            "--device": device != "auto",
            "--clock": clock is not Timer.WALL,
        }
        bench_vllm.run(
            output,
            bench_vllm.Asked(
                model=model,
                random=_sources(model, random or [], []) if random else [],
                adapted=make_strategies(adapt or [], settings or []),
                no_harm=no_harm,
                prompts=_numbers("prompt", prompt or "64"),
                requests=_numbers("batch", batch or "1,8,32,128"),
                new_tokens=new_tokens,
                repeats=repeats,
                seed=seed,
                dtype=dtype,
                engine=engine or [],
            ),
            [option for option, is_given in given.items() if is_given],
            machine(find_device("auto")),
        )
        return
    if engine:
        raise ConfigError("--engine is for vLLM. Add --vllm, or leave it out.")
    # not at the top: they bring all of transformers, which other subcommands can do without
    from ttrouting.bench.plot import check_plot
    from ttrouting.bench.plot import plot as draw

    lengths, batches = _numbers("prompt", prompt or "128"), _numbers("batch", batch or "1")
    groups = make_groups(adapt or STRATEGIES, settings or [], vary or [])
    sources = _sources(model, random or [], file or [])
    place = find_device(device)
    if place != "auto" and torch.device(place).type not in ("cpu", "cuda"):
        raise ConfigError(f"bench measures on cpu and cuda, not on {place}. Use --device cpu.")
    if clock is Timer.CPU and place != "cpu":
        raise ConfigError("--clock cpu knows nothing of work elsewhere. Use --device cpu, or --clock wall.")
    if plot is not None:
        check_plot(plot)
    texts = "\n".join(gather([], file or []))
    results: list[Result] = []
    for source in sources:
        with output.waiting(f"loading {source}", random is None and downloads(model)) as say:
            loaded, tokenizer = (
                (_build(source, max(lengths) + new_tokens, dtype, place, seed), None)
                if random
                else load_model(model, dtype.value, device)
            )
        with output.waiting(f"{source}: finding its MoE layers") as say:
            results += _measure(
                source,
                loaded,
                tokenizer,
                groups,
                no_harm,
                texts,
                (lengths, batches, new_tokens, repeats, seed, clock.value),
                say,
            )
    for result in results:
        output.show(_title(result), _table(result), Text())
    if plot is not None:
        draw(results, plot)
        output.note(f"Plot: {plot}")
    output.note(
        "ratio: ours to theirs, under 1 is cheaper; median (quartiles) over repetitions. bound: the same by counting."
    )
    output.data(
        {
            "results": [_facts(r) for r in results],
            "no_harm": no_harm,
            "repeats": repeats,
            "clock": clock.value,
            "seed": seed,
            "texts": [str(f) for f in file or []],
            "machine": machine(place),
            "versions": versions(),
        }
    )


def make_groups(adapt: Sequence[str], settings: Sequence[str], vary: Sequence[str]) -> dict[str, list[Strategy]]:
    """What is measured: each `--adapt` with every combination of the values in `--vary`, by name.

    Raises:
        ConfigError: as `make_strategies`; a strategy that is set or varied and not measured.
    """
    used = list(dict.fromkeys(name.strip() for names in adapt for name in names.split(",")))
    make_strategies(used, settings)  # refuses what no group would tell
    axes = [(setting.partition("=")[0].strip(), setting.partition("=")[2].split(",")) for setting in vary]
    make_strategies(used, [f"{path}={values[0]}" for path, values in axes])
    groups: dict[str, list[Strategy]] = {}
    for names in adapt:
        here = {s.name for s in make_strategies([names])}
        own = [s for s in settings if _owner(s) in here]
        varied = [(path, values) for path, values in axes if _owner(f"{path}=") in here]
        for values in product(*(values for _, values in varied)):
            changes = [f"{path}={value}" for (path, _), value in zip(varied, values, strict=True)]
            label = " ".join([names, *(c.partition(".")[2] for c in changes)])
            groups[label] = make_strategies([names], [*own, *changes])
    return groups


def _owner(setting: str) -> str:
    return next(iter(read_settings([setting])))


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--{option} takes whole numbers of at least 1 with commas, such as 64,512; got {text!r}.")
    return list(dict.fromkeys(int(part) for part in parts))


def _sources(model: str, random: Sequence[str], files: Sequence[Path]) -> list[str]:
    from ttrouting.bench.models import Spec

    if not random:
        return [model]
    if model != POCKET:
        raise ConfigError("--model and --random exclude each other. Give one of them.")
    if files:
        raise ConfigError("--file needs a tokenizer, and a --random model has none. Leave it out.")
    return [str(Spec.parse(text)) for text in random]


def _build(source: str, longest: int, dtype: Dtype, place: str, seed: int) -> Any:
    from ttrouting.bench.models import Spec

    if place == "auto":
        raise ConfigError("--device map spreads weights that are loaded; a --random model needs one device.")
    wanted = torch.float32 if dtype is Dtype.AUTO else getattr(torch, dtype.value)
    return Spec.parse(source).build(longest, wanted, place, seed)


def _measure(
    name: str,
    model: Any,
    tokenizer: Any,
    groups: dict[str, list[Strategy]],
    no_harm: bool,
    texts: str,
    plan: tuple[list[int], list[int], int, int, int, str],
    say: Any,
) -> list[Result]:
    from ttrouting.bench.run import cut_prompts, measure, random_prompts
    from ttrouting.bench.versions import contenders

    lengths, batches, new_tokens, repeats, seed, clock = plan
    device = model.get_input_embeddings().weight.device
    found: list[Result] = []
    text = torch.tensor(tokenizer(texts)["input_ids"], device=device) if texts else None
    with contenders(model, groups, no_harm, tokenizer) as ready:
        for tokens, batch in product(lengths, batches):
            if text is not None:
                ids = cut_prompts(text, batch, tokens)
            else:
                ids = random_prompts(model.config.get_text_config().vocab_size, batch, tokens, device, seed)
            found += measure(name, model, ready, ids, new_tokens, repeats, seed, clock, say)
    return found


def machine(place: str) -> dict[str, Any]:
    """What a benchmark ran on."""
    facts: dict[str, Any] = {
        "device": place,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if place != "auto" and torch.device(place).type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(place), "cuda": torch.version.cuda}
    return facts


def _title(result: Result) -> Text:
    title = Text(result.contender, "bold")
    return title.append(f"  {result.batch} x {result.prompt} tokens, {result.model}", "not bold dim")


def _table(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    widths = {"quantity": 11, "against": 27, "ours": 11, "theirs": 11, "ratio": 23, "bound": 6, "ratio/bound": 11}
    for column, width in widths.items():
        left = column in ("quantity", "against")
        table.add_column(column, justify="left" if left else "right", min_width=width, no_wrap=True)
    for c in result.comparisons:
        table.add_row(
            c.quantity,
            c.against,
            _value(c, c.ours, result.batch),
            _value(c, c.theirs, result.batch),
            f"{c.ratio.median:.3f} ({c.ratio.low:.3f}-{c.ratio.high:.3f})",
            "" if c.bound is None else f"{c.bound:.3f}",
            "" if c.over_bound is None else f"{c.over_bound:.2f}",
        )
    return table


def _value(comparison: Comparison, spread: Spread, batch: int) -> str:
    if comparison.quantity == "memory":
        return f"{spread.median / MIB:.1f} MiB"
    if comparison.quantity == "decode":
        return f"{batch / spread.median:.1f} tok/s"
    return f"{1000 * spread.median:.1f} ms"


def _facts(result: Result) -> dict[str, Any]:
    facts = asdict(result)
    for plain, comparison in zip(facts["comparisons"], result.comparisons, strict=True):
        plain["over_bound"] = comparison.over_bound
    return facts
