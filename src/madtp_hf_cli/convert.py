"""`madtp-hf convert`: turn an original checkpoint into a folder that transformers loads."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .common import check_out, written_in_one_step


_TOKENIZERS = {"BLIP": "bert-base-uncased", "CLIP": "openai/clip-vit-base-patch32"}


def _load_tokenizer(source: str, family: str):
    """Load the tokenizer: for BLIP, BERT's with the two tokens that BLIP adds; for CLIP, CLIP's."""
    from huggingface_hub import HfApi
    from transformers import BertTokenizer, CLIPTokenizer

    tokenizer_class = BertTokenizer if family == "BLIP" else CLIPTokenizer

    def load(**options):
        tokenizer = tokenizer_class.from_pretrained(source, **options)
        # Without files, transformers makes a tokenizer that knows only special tokens.
        return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None

    tokenizer, reason = None, "it has no vocabulary"
    try:
        tokenizer = load(local_files_only=True)
        if tokenizer is None and not Path(source).is_dir():
            # Ask the Hub once: otherwise each file of the tokenizer is requested again and again, for minutes.
            HfApi().model_info(source, timeout=10)
            tokenizer = load()
    except Exception as error:  # raised by the tokenizers library, which raises bare ones, or by the network
        reason = str(error).strip().partition("\n")[0].rstrip(".")
    if tokenizer is None:
        raise ValueError(
            f"The tokenizer {source!r} could not be loaded ({reason}): pass --tokenizer FOLDER, one with the vocab.txt"
            " or"
            f" tokenizer.json of {_TOKENIZERS[family]}."
        )
    if family == "CLIP":
        return tokenizer
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def _take_special_tokens(model, tokenizer, source: str) -> None:
    """Check that the tokenizer is the model's own, then set the configuration's special tokens to the tokenizer's."""
    config, text_config = model.config, model.config.text_config
    found = len(tokenizer), *tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    expected = text_config.vocab_size, text_config.bos_token_id, config.encoder_token_id
    if found != expected:
        raise ValueError(
            "The tokenizer {!r} has {} tokens, [DEC] is {} and [ENC] {}; the checkpoint has {}, {} and {}: pass the"
            " tokenizer that it was"
            " trained with, for BLIP bert-base-uncased, with --tokenizer.".format(source, *found, *expected)
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    text_config.sep_token_id = tokenizer.sep_token_id
    for settings in (text_config, model.generation_config) if model.can_generate() else (text_config,):
        settings.eos_token_id = tokenizer.sep_token_id
        settings.pad_token_id = tokenizer.pad_token_id


def _take_clip_tokens(model, tokenizer, source: str) -> None:
    """Do what `_take_special_tokens` does, for CLIP."""
    text_config = model.config.text_config
    found = len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    expected = text_config.vocab_size, text_config.bos_token_id, text_config.eos_token_id
    if found != expected:
        raise ValueError(
            "The tokenizer {!r} has {} tokens, a text starts with {} and ends with {}; in the checkpoint these are {},"
            " {} and {}: pass the"
            " tokenizer that it was trained with, CLIP's own, with --tokenizer.".format(source, *found, *expected)
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    text_config.pad_token_id = tokenizer.pad_token_id


def _make_processor(model, tokenizer, source: str, family: str):
    """Make the processor of images and texts, after checking that the tokenizer is the model's own."""
    from transformers import BlipImageProcessor, BlipProcessor, CLIPImageProcessor, CLIPProcessor

    side = model.config.vision_config.image_size
    size = {"height": side, "width": side}
    if family == "CLIP":
        _take_clip_tokens(model, tokenizer, source)
        return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size), tokenizer)
    _take_special_tokens(model, tokenizer, source)
    return BlipProcessor(BlipImageProcessor(size=size), tokenizer)


def _notes(source: str, config, is_aligned: bool) -> str:
    """Return what the model card says about a conversion."""
    temperature = getattr(config, "original_temperature", None)
    if temperature is not None:
        alignment = f"""Its alignment tokens are the checkpoint's own, trained at a pruning temperature of
{temperature:g}: the last of the lines below prunes as in that training."""
    elif is_aligned:
        alignment = "Its alignment tokens are the checkpoint's own."
    else:
        alignment = """The checkpoint was a dense one: its alignment tokens are new. Train with pruning on to keep the
accuracy at larger reductions."""
    return f"Converted from `{source}` by `madtp-hf convert`. {alignment}"


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="IN", help="Of the original BLIP, CLIP or MADTP code: .pth or .safetensors.")
    ],
    out: options.OutFolder,
    task: Annotated[
        str, typer.Option(metavar="TASK", help="What it was trained for: vqa, captioning, nlvr2, retrieval or clip.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER", help="The one it was trained with; by default bert-base-uncased, or CLIP's own."
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", min=1, help="Interpolate positions to this size; by default the checkpoint's."),
    ] = None,
    force: options.Force = False,
) -> None:
    """Turn an original checkpoint of BLIP, CLIP or MADTP into a folder that transformers loads.

    OUT gets configuration, weights, modeling files, processor, tokenizer and a model card, and appears only when it is
    complete.

    Example: madtp-hf convert model_base_vqa_capfilt_large.pth blip-vqa --task vqa
    """
    out = out.resolve()
    check_out(out, checkpoint, force)
    from madtp_hf.checkpoints.card import create_model_card
    from madtp_hf.checkpoints.convert import convert_original_checkpoint, read_checkpoint
    from madtp_hf.tasks import TASKS

    if task not in TASKS:
        raise typer.BadParameter(f"{task!r}, expected one of {', '.join(TASKS)}.", param_hint="--task")
    content = read_checkpoint(checkpoint)
    family = TASKS[task].family
    source = tokenizer or _TOKENIZERS[family]
    loaded = _load_tokenizer(source, family)
    model = convert_original_checkpoint(content, task, image_size=image_size)
    processor = _make_processor(model, loaded, source, family)
    side = model.config.vision_config.image_size
    is_aligned = "space_dict" in content.get("model", content)
    card = create_model_card(model.config, out.name, notes=_notes(checkpoint.name, model.config, is_aligned))

    with written_in_one_step(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card.save(folder / "README.md")
    typer.echo(
        f"{out}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, images of {side} x {side}"
        " pixels."
    )
