"""`ttrouting chat`: which model or server answers, and where do messages come from: `-p`, a pipe, a terminal?"""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from typing import Annotated

import typer

from ttrouting.cli.chat.answers import Engine
from ttrouting.cli.chat.interrupts import Leave
from ttrouting.cli.chat.local import LocalEngine
from ttrouting.cli.chat.screen import Screen
from ttrouting.cli.chat.switches import FRESH, Settings, Switches
from ttrouting.cli.chat.talk import Chat
from ttrouting.cli.generate import versions
from ttrouting.cli.models import POCKET, downloads, few_threads, load_model
from ttrouting.cli.options import Adapt, Debug, Device, Dtype, DtypeName, Json, Load, ModelName, NoHarm
from ttrouting.cli.options import Settings as Options
from ttrouting.cli.output import Output, exit_code
from ttrouting.cli.settings import make_strategies
from ttrouting.errors import ConfigError


def command(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this one message and end.")
    ] = None,
    adapt: Adapt = None,
    options: Options = None,
    load: Load = None,
    no_harm: NoHarm = True,
    model: ModelName = POCKET,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="Ask a running OpenAI-compatible server, such as 'ttrouting serve'; --model is the name it serves.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(min=0, help="Sample at this temperature; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this share of probability.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk with a model, and turn strategies on and off between answers; greedy unless a sampling option is given.

    In a terminal: /help. From a pipe each line is a message or a command. Answers go to stdout, the rest to stderr.

    Example: ttrouting chat --adapt scmoe --set scmoe.beta=0.3
    """
    output = Output(as_json)
    talks = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if talks and as_json:
        raise ConfigError("--json is for one message (-p TEXT) or lines from a pipe. Leave it out in a terminal.")
    if prompt is not None and not prompt.strip():
        raise ConfigError("-p is empty. Give a message, or leave -p out to chat.")
    strategies = make_strategies(adapt or [], options or [], load or [])
    settings = Settings(max_new_tokens, temperature, top_p, seed, no_harm)
    with ExitStack() as held:
        if talks:
            from ttrouting.cli.chat.terminal import converse, keys_unseen  # what only a terminal needs

            held.enter_context(keys_unseen())
        engine: Engine
        with output.waiting(f"asking {server}" if server else f"loading {model}", not server and downloads(model)):
            if server is not None:
                from ttrouting.cli.chat.remote import RemoteEngine  # what only a server needs

                engine = RemoteEngine(server, model)
                settings = settings.changed("adaptation", FRESH)
            else:
                loaded, tokenizer = load_model(model, dtype.value, device)
                held.enter_context(few_threads(loaded))
                engine = LocalEngine(loaded, tokenizer, model)
        held.enter_context(closing(engine))
        screen = Screen(output, live=sys.stdout.isatty())
        chat = Chat(engine, screen, settings, Switches(tuple(strategies)), interruptible=talks)
        if talks:
            converse(chat)
            return
        try:
            for line in sys.stdin if prompt is None else [prompt]:
                chat.handle(line)
        except Leave:
            pass
        except UnicodeDecodeError as error:
            chat.fail(ConfigError(f"stdin is not UTF-8 text (byte {error.start} of a part). Convert it first."))
        output.data(
            {
                "model": engine.name,
                "strategies": [s.to_dict() for s in chat.switches.on],
                "no_harm": chat.settings.no_harm,
                "answers": [{"message": text, **answer.to_dict()} for text, answer in chat.answers],
                "versions": versions(),
            }
        )
        if chat.refused is not None:  # it was told when it happened
            raise typer.Exit(exit_code(chat.refused))
