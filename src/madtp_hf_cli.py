"""The `madtp-hf` command: `madtp-hf convert model_base_vqa.pth my-blip --task vqa`.

It stands beside the package, so that `madtp-hf --help` imports neither the package nor torch: each command imports
what it needs.
"""

import os
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated


try:
    import typer
except ImportError as error:
    raise ImportError("The `madtp-hf` command needs typer: pip install 'madtp_hf[cli]'.") from error


app = typer.Typer(
    help="BLIP and CLIP made faster: MADTP token pruning, in the manner of transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def _one_message_of_errors():
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


def _check_out(out: Path, checkpoint: Path, force: bool) -> None:
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


_TOKENIZERS = {"BLIP": "bert-base-uncased", "CLIP": "openai/clip-vit-base-patch32"}


def _load_tokenizer(source: str, family: str):
    """BLIP's tokenizer, BERT's with two tokens that BLIP adds to it, or CLIP's."""
    from huggingface_hub import HfApi
    from transformers import BertTokenizer, CLIPTokenizer

    tokenizer_class = BertTokenizer if family == "BLIP" else CLIPTokenizer

    def load(**options):
        tokenizer = tokenizer_class.from_pretrained(source, **options)
        # Where there are no files, transformers makes one that knows special tokens alone.
        return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None

    tokenizer, reason = None, "it has no vocabulary"
    try:
        tokenizer = load(local_files_only=True)
        if tokenizer is None and not Path(source).is_dir():
            # Ask once whether the Hub has it: each file of a tokenizer by itself would be asked for again and again, for minutes.
            HfApi().model_info(source, timeout=10)
            tokenizer = load()
    except Exception as error:  # of the tokenizers library, which raises bare ones, and of the network
        reason = str(error).strip().partition("\n")[0].rstrip(".")
    if tokenizer is None:
        raise ValueError(
            f"The tokenizer {source!r} could not be loaded ({reason}): pass --tokenizer FOLDER, one with the vocab.txt or"
            f" tokenizer.json of {_TOKENIZERS[family]}."
        )
    if family == "CLIP":
        return tokenizer
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def _take_special_tokens(model, tokenizer, source: str) -> None:
    """Set the special tokens of the model's configuration to the tokenizer's, once it is sure to be the model's own."""
    config, text_config = model.config, model.config.text_config
    found = len(tokenizer), *tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    expected = text_config.vocab_size, text_config.bos_token_id, config.encoder_token_id
    if found != expected:
        raise ValueError(
            "The tokenizer {!r} has {} tokens, [DEC] is {} and [ENC] {}; the checkpoint has {}, {} and {}: pass the tokenizer that it was"
            " trained with, for BLIP bert-base-uncased, with --tokenizer.".format(source, *found, *expected)
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    text_config.sep_token_id = tokenizer.sep_token_id
    for settings in (text_config, model.generation_config) if model.can_generate() else (text_config,):
        settings.eos_token_id = tokenizer.sep_token_id
        settings.pad_token_id = tokenizer.pad_token_id


def _take_clip_tokens(model, tokenizer, source: str) -> None:
    """As `_take_special_tokens`, for CLIP."""
    text_config = model.config.text_config
    found = len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    expected = text_config.vocab_size, text_config.bos_token_id, text_config.eos_token_id
    if found != expected:
        raise ValueError(
            "The tokenizer {!r} has {} tokens, a text starts with {} and ends with {}; in the checkpoint these are {}, {} and {}: pass the"
            " tokenizer that it was trained with, CLIP's own, with --tokenizer.".format(source, *found, *expected)
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    text_config.pad_token_id = tokenizer.pad_token_id


def _make_processor(model, tokenizer, source: str, family: str):
    """The processor of images and texts, once the tokenizer is sure to be the model's own."""
    from transformers import BlipImageProcessor, BlipProcessor, CLIPImageProcessor, CLIPProcessor

    side = model.config.vision_config.image_size
    size = {"height": side, "width": side}
    if family == "CLIP":
        _take_clip_tokens(model, tokenizer, source)
        return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size), tokenizer)
    _take_special_tokens(model, tokenizer, source)
    return BlipProcessor(BlipImageProcessor(size=size), tokenizer)


def _notes(source: str, config, is_aligned: bool) -> str:
    """What the model card says of a conversion."""
    temperature = getattr(config, "original_temperature", None)
    if temperature is not None:
        alignment = f"""Its alignment tokens are the checkpoint's own, trained at a pruning temperature of {temperature:g}: the last of the lines
below prunes as in that training."""
    elif is_aligned:
        alignment = "Its alignment tokens are the checkpoint's own."
    else:
        alignment = """The checkpoint was a dense one: its alignment tokens are new. Train with pruning on to keep the accuracy at larger
reductions."""
    return f"Converted from `{source}` by `madtp-hf convert`. {alignment}"


@app.callback()
def main() -> None:
    # With a callback, typer keeps `convert` a subcommand whatever the number of commands.
    pass


@app.command()
def version() -> None:
    """Print the version of madtp_hf."""
    from madtp_hf import __version__

    typer.echo(__version__)


@app.command(no_args_is_help=True)
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A checkpoint of the original BLIP, CLIP or MADTP code: .pth or .safetensors."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write: new, or empty.")],
    task: Annotated[
        str, typer.Option(metavar="TASK", help="What it was trained for: vqa, captioning, nlvr2, retrieval, or clip.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            help="The tokenizer that it was trained with: on the Hub, or a folder. bert-base-uncased, or CLIP's, if not given.",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="The size of the images to take, if not the checkpoint's: positions are interpolated.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT, and all that is in it.")] = False,
) -> None:
    """Turn an original checkpoint of BLIP, CLIP or MADTP into a folder that transformers loads.

    OUT gets configuration, weights, modeling files, processor, tokenizer and a model card, and appears only when it is complete.

    Example: madtp-hf convert model_base_vqa_capfilt_large.pth blip-vqa --task vqa
    """
    with _one_message_of_errors():
        from madtp_hf.conversion import convert_original_checkpoint, read_checkpoint
        from madtp_hf.model_card import create_model_card
        from madtp_hf.tasks import TASKS

        if task not in TASKS:
            raise typer.BadParameter(f"{task!r}, expected one of {', '.join(TASKS)}.", param_hint="--task")
        out = out.resolve()
        _check_out(out, checkpoint, force)
        content = read_checkpoint(checkpoint)
        family = TASKS[task].family
        source = tokenizer or _TOKENIZERS[family]
        loaded = _load_tokenizer(source, family)
        model = convert_original_checkpoint(content, task, image_size=image_size)
        processor = _make_processor(model, loaded, source, family)
        side = model.config.vision_config.image_size
        is_aligned = "space_dict" in content.get("model", content)
        card = create_model_card(model.config, out.name, notes=_notes(checkpoint.name, model.config, is_aligned))

        out.parent.mkdir(parents=True, exist_ok=True)
        # Made beside OUT, so that it takes its place in one step.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            made, replaced = Path(scratch, "made"), Path(scratch, "replaced")
            made.mkdir()
            model.save_pretrained(made)
            processor.save_pretrained(made)
            card.save(made / "README.md")
            if out.exists():
                out.rename(replaced)
            try:
                made.rename(out)
            except OSError:
                if replaced.exists():
                    replaced.rename(out)
                raise
    typer.echo(
        f"{out}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, images of {side} x {side} pixels."
    )


@app.command(no_args_is_help=True)
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go up, and do nothing. Needs no token.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="A token with write access; better `hf auth login` or HF_TOKEN, which others can't see.",
        ),
    ] = None,
) -> None:
    """Publish a checkpoint: all of it in one commit, once it is found to be complete.

    A FOLDER without README.md gets a model card on the way. Files that are no part of the checkpoint stay where they are.

    Example: madtp-hf push blip-vqa org/blip-madtp --dry-run
    """
    with _one_message_of_errors():
        from madtp_hf.hub import push_folder

        url = push_folder(
            folder,
            repo,
            metrics=metrics,
            token=token,
            private=private,
            revision=revision,
            commit_message=message,
            dry_run=dry_run,
        )
    if not dry_run:
        typer.echo(url)


if __name__ == "__main__":
    app()
