"""`madtp-hf push`: publish a checkpoint on the Hub."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved checkpoint, as `convert` writes it.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The name to publish it as: NAMESPACE/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch to commit to; by default main.")
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The commit message.")] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Numbers for the model card; by default FOLDER's results.json."),
    ] = None,
    handler: Annotated[
        bool, typer.Option("--handler", help="Add the handler.py that Hugging Face Inference Endpoints run.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded; needs no token.")] = False,
    space: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Also publish a Space, NAMESPACE/NAME, that shows what the model drops."),
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option(metavar="JSON", help='For the Space: a file of [["scene.png", "how many?"], ...], or `digits`.'),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="A token with write access; safer: `hf auth login` or HF_TOKEN."),
    ] = None,
) -> None:
    """Publish a checkpoint in one commit, after checking that it is complete.

    With --space, also publish a Space that shows what the checkpoint drops; with --private, the Space is private and
    has a copy of the checkpoint. A FOLDER without README.md gets a model card. Other files are not uploaded.

    Example: madtp-hf push blip-vqa org/blip-madtp --dry-run
    """
    from madtp_hf.checkpoints.push import push_folder

    if space is not None:
        from madtp_hf.serving.space import check_space, push_space

        check_space(folder)
        pairs = _read_examples(examples)
    elif examples is not None:
        raise ValueError("--examples is for a Space: pass --space NAMESPACE/NAME as well.")
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
