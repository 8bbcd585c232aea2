"""`madtp-hf push`: publish a checkpoint on the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .common import one_message_of_errors


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved checkpoint, as `convert` writes it.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The name to publish it as: NAMESPACE/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch to commit to; main if not given.")
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The commit's message.")] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="The numbers for the model card; FOLDER's results.json if not given."),
    ] = None,
    handler: Annotated[
        bool, typer.Option("--handler", help="Add the handler.py that Hugging Face Inference Endpoints run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go up, and do nothing. Needs no token.")
    ] = False,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Publish a Space as well, NAMESPACE/NAME, that shows what the checkpoint drops.",
        ),
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='What the Space begins with: a file of [["scene.png", "how many?"], ...], or `digits`.',
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="A token with write access; better `hf auth login` or HF_TOKEN, which others can't see.",
        ),
    ] = None,
) -> None:
    """Publish a checkpoint: all of it in one commit, once it is found to be complete.

    With --space, a Space as well that shows what the checkpoint drops; with --private, it is private and has a copy of
    the checkpoint. A FOLDER without README.md gets a model card on the way. Files that are no part of the checkpoint
    stay where they are.

    Example: madtp-hf push blip-vqa org/blip-madtp --dry-run
    """
    with one_message_of_errors():
        from madtp_hf.checkpoints.push import push_folder

        if space is not None:
            from madtp_hf.serving.space import check_space, push_space

            check_space(folder)
            pairs = _read_examples(examples)
        elif examples is not None:
            raise ValueError("--examples is for a Space: expected --space NAMESPACE/NAME beside it.")
        url = push_folder(
            folder,
            repo,
            metrics=metrics,
            token=token,
            private=private,
            revision=revision,
            commit_message=message,
            dry_run=dry_run,
            handler=handler,
        )
        urls = [url]
        if space is not None:
            # A Space can't read a private checkpoint, so it gets a copy.
            source = folder if private else "/".join(url.split("/")[3:])
            urls.append(
                push_space(
                    source,
                    space,
                    examples=pairs,
                    model_revision=revision,
                    token=token,
                    private=private,
                    commit_message=message,
                    dry_run=dry_run,
                )
            )
    if not dry_run:
        typer.echo("\n".join(urls))


def _read_examples(examples: str | None) -> list[tuple]:
    if examples is None:
        return []
    if examples == "digits":
        from madtp_hf.serving.page import digit_examples

        return digit_examples()
    from madtp_hf.serving.space import read_examples

    return read_examples(examples)
