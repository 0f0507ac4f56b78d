"""Which subcommands are there, and how does the command end when something goes wrong?

Exit codes: 0 done; 2 what was asked for is wrong (an option, a name, a combination, a file); 1 the model or
the call cannot be adapted; 130 interrupted.
"""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ttrouting.cli import (
    bench,
    calibrate,
    chat,
    demo,
    evaluate,
    generate,
    inspect,
    refset,
    report,
    serve,
    sites,
    strategies,
    tune,
)
from ttrouting.cli.options import DEBUG
from ttrouting.cli.output import Output, encode_anything, exit_code
from ttrouting.errors import TTRoutingError


class _Commands(TyperGroup):
    """Turns the errors that ttrouting raises on purpose into one line and an exit code.

    Anything else is a bug and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            Output().note("Interrupted. The model was left as it was.")
            raise typer.Exit(130) from None
        except TTRoutingError as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            Output().error(str(error))
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    cls=_Commands,
    help="Adapt the routing of Mixture-of-Experts models at test time, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from ttrouting import __version__

        Output().text(f"ttrouting {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


app.command("demo")(demo.command)
app.command("generate")(generate.command)
app.command("inspect")(inspect.command)
app.command("chat")(chat.command)
app.command("sites")(sites.command)
app.command("calibrate")(calibrate.command)
app.command("bench")(bench.command)
app.command("eval")(evaluate.command)
app.command("tune")(tune.command)
app.command("report")(report.command)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.command)
app.command("strategies")(strategies.command)
app.add_typer(refset.group, name="refset")


def main() -> None:
    """Run the command line in `sys.argv` and end the process with its exit code."""
    encode_anything()
    app(prog_name="ttrouting")
