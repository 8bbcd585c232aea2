"""What the commands share: how options are parsed, one-line errors, exit codes, and protection of existing output."""

import os
import re
import tempfile
import warnings
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

import typer
from typer.core import TyperCommand


# Exit codes: 1 is an error and 2 a wrong option, as elsewhere.
SOME_FAILED = 3
INTERRUPTED = 130
EXIT_CODES = "Exit code: 0 all rows done, 3 some rows failed, 1 error, 2 wrong option, 130 stopped."
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")  # they tell on import of what they lack
# Arguments of library functions whose option has another name.
_OTHER_NAMES = (
    ("num_workers", "workers"),
    ("texts", "text"),
    ("reduction", "reductions"),
    ("pruning_method", "method"),
    ("pruning_method", "methods"),
)


def with_hyphens(name: str) -> str:
    """Spell an option with hyphens: click applies this to what is typed, so that underscores are accepted."""
    return name.replace("_", "-")


def _is_value(metavar: str, argument: str) -> bool:
    """Whether an argument can be another value of an option: of `KIND=NAME ...`, of `METHOD ...` or of numbers."""
    if "=" in metavar:
        return "=" in argument
    value = r"[a-z_]+" if metavar.startswith("METHOD") else r"[-+]?[\d.]+(e[-+]?\d+)?"
    return re.fullmatch(value, argument) is not None


class Command(TyperCommand):
    """A command whose options may take several values at once, and whose errors are one line.

    An option whose metavar ends in "..." reads `--reductions 0.3 0.5` as click's `--reductions 0.3 --reductions 0.5`.
    """

    def parse_args(self, ctx, args):
        metavars = {name: option.metavar or "" for option in self.params for name in option.opts}
        expanded: list[str] = []
        current = metavar = ""
        for argument in args:
            if argument.startswith("--"):
                current, metavar = argument, metavars.get(with_hyphens(argument), "")
            elif metavar.endswith("...") and _is_value(metavar, argument):
                if expanded[-1] != current:
                    expanded.append(current)
            else:
                metavar = ""
            expanded.append(argument)
        return super().parse_args(ctx, expanded)

    def invoke(self, ctx):
        with one_message_of_errors(self.params):
            return super().invoke(ctx)


def as_options(message: str, params=()) -> str:
    """Replace a library's Python arguments in a message, such as `force=True`, by a command's options: `--force`."""
    names = {option.name: option.opts[0] for option in params if option.opts[0].startswith("--")}
    names = {other: names[name] for other, name in _OTHER_NAMES if name in names} | names
    message = message.replace("on_error='skip'", names.get("skip_unreadable", "on_error='skip'"))
    for name, option in names.items():
        argument = rf"(?<![\w/.(-])(?<!, ){name}"
        message = re.sub(rf'{argument}={{"(\w+)": ([^}}]*)}}', rf"{option} \1=\2", message)
        message = re.sub(rf"`{name}(?:=True)?`|{argument}=True\b", option, message)
        message = re.sub(rf"{argument}='([^']*)'", rf"{option} \1", message)
        message = re.sub(rf"{argument}=(?=\S)", f"{option} ", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w/.-]){name}(?![\w/=-])", option, message)
    return message


@contextmanager
def one_message_of_errors(params=()):
    """Report an error that a user can correct as one message on stderr, exit code 1, without traceback.

    Of warnings, only this package's own are shown, such as those of calibration or conversion, one line each.

    params: the command's parameters, by whose names the message calls arguments.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    def say(message):
        typer.echo(f"madtp-hf: {as_options(str(message), params)}", err=True)

    for name in _NOISY_LOGGERS:
        getLogger(name).setLevel("ERROR")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, message="The schedule|Left out|Assumed")
            warnings.showwarning = lambda message, *_: say(message)
            yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        say(error)
        raise typer.Exit(1) from None
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def warnings_as_messages():
    """Print this package's own warnings, such as those of calibration, as messages on stderr, one line each.

    Yields a list, which holds the messages afterwards.
    """
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, message="The schedule|Left out")
        yield messages
    messages += [str(warning.message) for warning in caught]
    for message in messages:
        typer.echo(f"madtp-hf: {message}", err=True)


def exit_if_rows_were_left_out(messages: list[str]) -> None:
    """End the command with the exit code of rows without a result, if a warning tells of such rows."""
    if any(re.match(r"Left out \d+ of the rows", message) for message in messages):
        raise typer.Exit(SOME_FAILED)


def check_writable(out: Path) -> None:
    """Raise a `ValueError` if nothing can be written at `out`, a file or folder that may not exist yet."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    try:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a directory")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{out} can't be written ({error.strerror or error}): choose another location.") from None


def check_out(out: Path, source: Path | str, force: bool) -> None:
    """Raise a `ValueError` if the folder `out` must not or can't be written, or replaced with everything in it.

    source: what the command reads, a path or a Hub id.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file: expected the name of a folder to write.")
    if not force and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another folder, or replace everything in it with --force.")
    for kept in (Path(source).resolve(), Path.cwd(), Path(os.path.expanduser("~"))):
        if out.exists() and kept.is_relative_to(out):
            raise ValueError(f"{out} can't be replaced, because {kept} is in it: choose another folder.")
    check_writable(out)


def check_new_file(file: Path, force: bool) -> None:
    """Raise a `ValueError` if a file must not or can't be written."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder: expected the name of a file to write.")
    if file.exists() and not force:
        raise ValueError(f"{file} exists: choose another name, or replace it with --force.")
    check_writable(file)


@contextmanager
def written_in_one_step(out: Path):
    """Yield a folder to write to, which replaces `out` when all is written; after an error, `out` is unchanged."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside OUT, so that renaming puts it in place in one step.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made, replaced = Path(scratch, "made"), Path(scratch, "replaced")
        made.mkdir()
        yield made
        if out.exists():
            out.rename(replaced)
        try:
            made.rename(out)
        except OSError:
            if replaced.exists():
                replaced.rename(out)
            raise


def print_table(title: str, rows: list[dict]) -> None:
    """Print rows as a table with columns by name, and shares as percentages."""
    from rich.console import Console
    from rich.table import Table

    from madtp_hf.budgets.evaluation import bare_name, show_number

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(bare_name(name), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*("-" if value is None else show_number(name, value) for name, value in row.items()))
    Console(width=max(80, 14 * len(rows[0]))).print(table)
