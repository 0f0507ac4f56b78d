"""`ttrouting generate`: how does a model continue these prompts under these strategies?"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import transformers
import typer

import ttrouting as ttr
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


def command(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts, answered as one batch; '-' reads one from stdin.", show_default=False),
    ] = None,
    adapt: Adapt = None,
    settings: Settings = None,
    load: Load = None,
    no_harm: NoHarm = True,
    model: ModelName = POCKET,
    file: Files = None,
    escapes: Escapes = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float | None, typer.Option(min=0, help="Sample at this temperature; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this share of probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Also generate without the strategies.")] = False,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text under strategies; greedy unless a sampling option is given.

    Texts go to stdout, the report to stderr.

    Example: ttrouting generate -e "Q: 12+30\\nA:" --adapt scmoe --set scmoe.beta=0.3
    """
    output = Output(as_json)
    texts = gather(prompts or [], file or [], escapes)
    if not texts:
        raise ConfigError("No prompt. Give one as an argument, with --file, or '-' to read it from stdin.")
    strategies = make_strategies(adapt or [], settings or [], load or [])
    with output.waiting(f"loading {model}", downloads(model)) as say:
        loaded, tokenizer = load_model(model, dtype.value, device)
        inputs = encode(loaded, tokenizer, *templated(tokenizer, texts, chat))
        options = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_p)}
        base: list[str] = []
        with ttr.adapt(loaded, strategies, no_harm=no_harm, tokenizer=tokenizer) as adapted:
            say("generating")
            if compare:
                with adapted.paused():
                    base = _complete(adapted, tokenizer, inputs, options, seed)
            completions = _complete(adapted, tokenizer, inputs, options, seed)
            report = adapted.report
    many = len(texts) > 1
    for number, completion in enumerate(completions):
        if compare:
            output.text(f"--- prompt {number}, base\n{base[number]}\n--- prompt {number}, adapted")
        elif many:
            output.text(f"--- prompt {number}")
        output.text(completion)
    if not as_json:
        output.note(report if report.sequences else "No strategy is active: this is the model as it is.")
    output.data(
        {
            "model": model,
            "strategies": [s.to_dict() for s in strategies],
            "no_harm": no_harm,
            "generation": {**options, "seed": seed},
            "sequences": [
                {"prompt": text, "completion": completion, **({"base": base[i]} if compare else {})}
                for i, (text, completion) in enumerate(zip(texts, completions, strict=True))
            ],
            "report": report.to_dict(),
            "versions": versions(),
        }
    )


def versions() -> dict[str, str]:
    """What a result was made with."""
    return {
        "ttrouting": ttr.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def templated(tokenizer: Any, texts: list[str], chat: bool) -> tuple[list[str], bool]:
    """The texts that the model reads, and whether the tokenizer adds its special tokens to them."""
    if not chat:
        return texts, True
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("--chat needs a tokenizer with a chat template, and this one has none. Leave --chat out.")
    turns = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns], False


def sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Arguments of `generate`. Options that were not given keep the model's own values."""
    if temperature == 0 or (temperature is None and top_p is None):
        # also the numbers, which a model's own settings may bring: generate warns of them when greedy
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    given = {"temperature": temperature, "top_p": top_p}
    return {"do_sample": True, **{name: value for name, value in given.items() if value is not None}}


def _complete(model: Any, tokenizer: Any, inputs: dict[str, Any], options: dict[str, Any], seed: int) -> list[str]:
    torch.manual_seed(seed)
    ids = model.generate(**inputs, **options)
    return [str(t) for t in tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]
