"""The `madtp-hf` command: `madtp-hf convert model_base_vqa.pth my-blip --task vqa`.

It lives outside the package, so that `madtp-hf --help` imports neither the package nor torch. Each command is in a
file of its own name, and imports what it needs when it runs.
"""

from typing import Annotated


try:
    import typer
except ImportError as error:
    raise ImportError("The `madtp-hf` command needs typer: pip install 'madtp_hf[cli]'.") from error

from .ask import ask
from .benchmark import benchmark
from .caption import caption
from .common import EXIT_CODES, Command, with_hyphens
from .convert import convert
from .embed import embed
from .evaluate import evaluate
from .export import export
from .index import index
from .prune import prune
from .push import push
from .search import search


def print_version(wanted: bool) -> None:
    """Print the version of madtp_hf and stop."""
    if wanted:
        from importlib.metadata import version

        typer.echo(version("madtp_hf"))
        raise typer.Exit


app = typer.Typer(
    help="BLIP and CLIP made faster by MADTP token pruning.",
    epilog=EXIT_CODES,
    context_settings={"token_normalize_func": with_hyphens},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    # With a callback, typer makes a subcommand of every command, even if there is only one.
    pass


@app.command()
def version() -> None:
    """Print the version of madtp_hf."""
    print_version(True)


for command in (convert, prune, evaluate, benchmark, caption, ask, embed, index, search, export, push):
    app.command(cls=Command, epilog=EXIT_CODES, no_args_is_help=True)(command)
