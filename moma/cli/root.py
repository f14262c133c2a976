"""The command line: `moma <verb>`. Bad input ends with one message and exit code 2."""

import io
import os
import sys
from typing import Any

from moma.cli import (
    bench,
    calibrate,
    data,
    demo,
    doctor,
    evaluate,
    generate,
    hub,
    inspect,
    plan,
    schema,
    serve,
    study,
    tokenizer,
)
from moma.cli import train as training
from moma.cli.arguments import App, ClosedOutputError, Group, Version
from moma.errors import (
    LostRankError,
    SharedError,
    StoppedError,
    UserError,
    shorten,
    to_user_error,
)
from moma.progress import show_log_messages

# The exit code that a shell reports of a program ended by SIGPIPE.
_CLOSED_OUTPUT_CODE = 141
_MESSAGE_LIMIT = 4000

app = App(
    name="moma",
    cls=Group,
    help="Pre-train, run and study mixed-modal language models with modality-aware sparsity.",
    no_args_is_help=True,
    add_completion=True,
)
families = (
    *(data, training, calibrate, evaluate, generate, inspect, serve),
    *(hub, study, plan, demo, doctor, schema),
)
for family in families:
    app.add_typer(family.app)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(bench.app, name="bench")


@app.callback()
def root(version: Version = False) -> None:
    """Options before the verb."""


def main() -> None:
    """Run a verb; a `UserError` becomes one line on standard error and its exit code."""
    # `datasets` would otherwise contact a server whenever it opens a file.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    # Huge pages on a CPU: gradients of experts are allocated in every step (docs/results/layer.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _prepare_output()
    show_log_messages()
    try:
        code = app(prog_name="moma", standalone_mode=False)
        sys.stdout.flush()
    except (ClosedOutputError, BrokenPipeError):
        code = _CLOSED_OUTPUT_CODE
    except Exception as error:
        code = _report(error)
    _discard_unwritten_output()
    if code == 130:  # Typer's answer to Ctrl-C
        print("moma: interrupted; the same command continues from what is saved", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _discard_unwritten_output() -> None:
    """What could not be printed must not fail once more when the interpreter exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_output() -> None:
    """Escape characters that the encoding lacks; without a stdout, print nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report(error: Exception) -> int:
    """Print the message of an error and return the exit code.

    Raises:
        Exception: `error` itself, if it is a defect of the program.
    """
    # Of Click, or of the copy of it that later versions of Typer contain.
    names = [kind.__name__ for kind in type(error).mro()]
    if "NoArgsIsHelpError" in names:
        print(error.ctx.get_help(), file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    if "UsageError" in names:
        return _print_message(_usage_message(error), 2)
    if isinstance(error, OSError):
        error = to_user_error(error) or error
    if isinstance(error, UserError | StoppedError):
        by_all = isinstance(error, SharedError | StoppedError)
        return _print_message(error, error.CODE, by_all)
    if isinstance(error, LostRankError):
        return _print_message(error, 1)
    raise error


def _usage_message(error: Any) -> str:
    message = " ".join(error.format_message().replace("Value error, ", "").split())
    command = error.ctx.command_path if error.ctx else "moma"
    return f"{message.rstrip('.')}; see `{command} --help`"


def _print_message(error: object, code: int, by_all: bool = False) -> int:
    """Print a message as one line; a message of all ranks of a job is printed by rank 0 only."""
    # A file name may contain line breaks and terminal codes.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    rank = os.environ.get("RANK") or "0"
    if rank == "0" or not by_all:
        origin = "moma" if rank == "0" else f"moma, rank {rank}"
        print(f"{origin}: {shorten(text, _MESSAGE_LIMIT)}", file=sys.stderr)
    return code
