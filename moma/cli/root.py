"""The command line: `moma <verb>`. Bad input ends with one message and exit code 2."""

import io
import os
import sys
from typing import Any

from moma.cli import bench, data, demo, evaluate, generate, hub, plan, schema, study, tokenizer
from moma.cli import train as training
from moma.cli.arguments import App, ClosedOutputError, Group, Version
from moma.errors import LostRankError, SharedError, StoppedError, UserError, os_error_message
from moma.progress import show_log_messages

# What a shell reports of a program that SIGPIPE ended.
_CLOSED_OUTPUT_CODE = 141

app = App(
    name="moma",
    cls=Group,
    help="Pre-train, run and study mixed-modal language models with modality-aware sparsity.",
    no_args_is_help=True,
)
for family in (data, training, evaluate, generate, study, plan, demo, schema):
    app.add_typer(family.app)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(bench.app, name="bench")
app.add_typer(hub.importing, name="import")
app.add_typer(hub.exporting, name="export")


@app.callback()
def root(version: Version = False) -> None:
    """What may precede a verb."""


def main() -> None:
    """Run a verb; a `UserError` becomes one line on standard error and its exit code."""
    # `datasets` would otherwise ask a server whenever it opens a file, also without a network.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    # Large pages for large tensors on a CPU, where the system has them: gradients of experts are
    # allocated in every step, page by page (docs/results/layer.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _prepare_output()
    show_log_messages()
    try:
        code = app(prog_name="moma", standalone_mode=False)
        sys.stdout.flush()
    except (ClosedOutputError, BrokenPipeError):
        # What is still buffered must not fail once more when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _CLOSED_OUTPUT_CODE
    except Exception as error:
        code = _report(error)
    if code == 130:  # Typer's answer to Ctrl-C
        print("moma: interrupted; the same command continues from what is saved", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_output() -> None:
    """Let every character be printed, and printing without a stdout do nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report(error: Exception) -> int:
    """Print what a person should know of an error, and return the exit code.

    Raises:
        Exception: `error` itself, if it is a defect of the program.
    """
    if isinstance(error, UserError | StoppedError):
        by_all = isinstance(error, SharedError | StoppedError)
        _print_message(error, by_all=by_all)
        return error.CODE
    if isinstance(error, LostRankError):
        _print_message(error)
        return 1
    if isinstance(error, OSError) and (message := os_error_message(error)) is not None:
        _print_message(message)
        return message.CODE
    # Of Click, or of the copy of it that later versions of Typer contain.
    if any(kind.__name__ == "NoArgsIsHelpError" for kind in type(error).mro()):
        print(error.ctx.get_help(), file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    if any(kind.__name__ == "UsageError" for kind in type(error).mro()):
        _print_message(_usage_message(error))
        return 2
    raise error


def _usage_message(error: Any) -> str:
    message = " ".join(error.format_message().replace("Value error, ", "").split())
    command = error.ctx.command_path if error.ctx else "moma"
    return f"{message.rstrip('.')}; see `{command} --help`"


def _print_message(error: object, by_all: bool = False) -> None:
    """Print a message; one that all ranks of a job have is printed by the first rank alone."""
    rank = int(os.environ.get("RANK", 0))
    if not rank:
        print(f"moma: {error}", file=sys.stderr)
    elif not by_all:
        print(f"moma, rank {rank}: {error}", file=sys.stderr)
