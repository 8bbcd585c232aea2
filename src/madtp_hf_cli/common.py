"""Helpers that the commands share: one-line errors, options, and protection of existing output."""

import os
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import typer
from typer.core import TyperGroup


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class ManyNumbers(TyperGroup):
    """A command group that reads `--reductions 0.3 0.5` as click's `--reductions 0.3 --reductions 0.5`."""

    options = ("--reductions", "--batch-sizes")

    def parse_args(self, ctx, args):
        expanded, current = [], None
        for argument in args:
            if argument in self.options:
                current = argument
            elif current and _is_number(argument):
                if expanded[-1] != current:
                    expanded.append(current)
            else:
                current = None
            expanded.append(argument)
        return super().parse_args(ctx, expanded)


@contextmanager
def one_message_of_errors():
    """Report an error that a user can correct as one message on stderr, exit code 1, without traceback or warnings."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        typer.echo(f"madtp-hf: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def warnings_as_messages():
    """Print this package's own warnings, such as those of calibration, as messages on stderr, one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, message="The schedule|Left out")
        yield
    for warning in caught:
        typer.echo(f"madtp-hf: {warning.message}", err=True)


def check_out(out: Path, source: Path | str, force: bool) -> None:
    """Raise a `ValueError` if `out` must not be written, or must not be replaced with all that is in it.

    source: what the command reads, a path or a Hub id.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: expected the name of a folder to write.")
    if not force and any(out.iterdir()):
        raise ValueError(
            f"{out} is not empty: choose another folder, or replace it and all that is in it with --force."
        )
    for kept in (Path(source).resolve(), Path.cwd(), Path(os.path.expanduser("~"))):
        if kept.is_relative_to(out):
            raise ValueError(f"{out} can't be replaced: {kept} is in it. Choose another folder.")


def check_new_file(file: Path, force: bool) -> None:
    """Raise a `ValueError` if a file must not be written."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder: expected the name of a file to write.")
    if file.exists() and not force:
        raise ValueError(f"{file} is there already: choose another, or replace it with --force.")


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

    from madtp_hf.budgets.evaluation import show_number

    def show(name, value):
        return (value or "-") if value is None or isinstance(value, str) else show_number(name, value)

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(show(name, value) for name, value in row.items()))
    Console(width=max(80, 14 * len(rows[0]))).print(table)
