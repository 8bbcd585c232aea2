"""What the commands share: errors of one line, and folders that are not written over."""

import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import typer


@contextmanager
def one_message_of_errors():
    """What a user can put right is one message on stderr and exit code 1: no traceback, and no library's warnings before it."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, ValueError, SafetensorError) as error:
        typer.echo(f"madtp-hf: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        logging.set_verbosity(verbosity)


def check_out(out: Path, checkpoint: Path, force: bool) -> None:
    """Raise a `ValueError` if `out` is not to be written, or to be replaced with all that is in it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: expected the name of a folder to write.")
    if not force and any(out.iterdir()):
        raise ValueError(
            f"{out} is not empty: choose another folder, or replace it and all that is in it with --force."
        )
    for kept in (checkpoint.resolve(), Path.cwd(), Path(os.path.expanduser("~"))):
        if kept.is_relative_to(out):
            raise ValueError(f"{out} can't be replaced: {kept} is in it. Choose another folder.")
