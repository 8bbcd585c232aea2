"""`madtp-hf convert`: turn an original checkpoint into a folder that transformers loads."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .common import check_out, written_in_one_step


def _load_tokenizer(source: str, family):
    """Load the tokenizer: for BLIP, BERT's with the two tokens that BLIP adds; for CLIP, CLIP's."""
    from huggingface_hub import HfApi
    from transformers import BertTokenizer, CLIPTokenizer

    tokenizer_class = BertTokenizer if family.name == "BLIP" else CLIPTokenizer

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
            f" or tokenizer.json of {family.tokenizer}."
        )
    if family.name == "CLIP":
        return tokenizer
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def _make_processor(model, tokenizer, source: str, family):
    """Make the processor of images and texts; take the special tokens of the tokenizer, if it is the model's own."""
    from transformers import BlipImageProcessor, BlipProcessor, CLIPImageProcessor, CLIPProcessor

    config, text_config = model.config, model.config.text_config
    is_clip = family.name == "CLIP"
    if is_clip:
        names, found = ("start of text", "end of text"), (tokenizer.bos_token_id, tokenizer.eos_token_id)
        expected = text_config.bos_token_id, text_config.eos_token_id
    else:
        names = "[DEC]", "[ENC]"
        found = tuple(tokenizer.convert_tokens_to_ids(list(names)))
        expected = text_config.bos_token_id, config.encoder_token_id
    if (len(tokenizer), *found) != (text_config.vocab_size, *expected):
        raise ValueError(
            "The tokenizer {!r} has {} tokens, {} {} and {} {}; the checkpoint has {}, {} and {}: pass the tokenizer"
            " that it was trained with, for {} {}, with --tokenizer.".format(
                *(source, len(tokenizer), names[0], found[0], names[1], found[1], text_config.vocab_size, *expected),
                *(family.name, family.tokenizer),
            )
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    text_config.pad_token_id = tokenizer.pad_token_id
    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    if is_clip:
        return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size), tokenizer)
    text_config.sep_token_id = tokenizer.sep_token_id
    for settings in (text_config, model.generation_config) if model.can_generate() else (text_config,):
        settings.eos_token_id = tokenizer.sep_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    return BlipProcessor(BlipImageProcessor(size=size), tokenizer)


def _read_config(path: Path, config_class):
    """Read a configuration of this package or of transformers, from a config.json or a folder with one."""
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path} can't be read ({error}): expected a config.json.") from None
    if not isinstance(fields, dict) or not {"text_config", "vision_config"} <= set(fields):
        raise ValueError(f"--config {path} has no text_config and vision_config: expected transformers' config.json.")
    dropped = ("model_type", "architectures", "auto_map", "custom_pipelines", "transformers_version")
    return config_class(**{name: value for name, value in fields.items() if name not in dropped})


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
        Path, typer.Argument(metavar="IN", help="A .pth, .pt or .safetensors of BLIP, CLIP, open_clip or MADTP.")
    ],
    out: options.OutFolder,
    task: Annotated[str, typer.Option(metavar="TASK", help="Its task: vqa, captioning, nlvr2, retrieval or clip.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME|FOLDER", help="Its tokenizer; by default bert-base-uncased, or CLIP's own."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A config.json for what weights don't tell; by default the original's."),
    ] = None,
    heads: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="VISION TEXT", help="Attention heads of the two towers; by default of width 64."),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="gelu or quick_gelu; by default BLIP's gelu, OpenAI's quick_gelu."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", min=1, help="Interpolate positions to this size; by default the checkpoint's."),
    ] = None,
    force: options.Force = False,
) -> None:
    """Turn an original checkpoint of BLIP, CLIP or MADTP into a folder that transformers loads.

    OUT gets configuration, weights, modeling files, processor, tokenizer and a model card, and appears only when it is
    complete. What weights don't tell is assumed, and the command says what it assumed.

    Example: madtp-hf convert model_base_vqa_capfilt_large.pth blip-vqa --task vqa
    """
    out = out.resolve()
    check_out(out, checkpoint, force)
    from madtp_hf.checkpoints.card import create_model_card
    from madtp_hf.checkpoints.convert import convert_original_checkpoint
    from madtp_hf.checkpoints.original import own_tensors, read_checkpoint
    from madtp_hf.tasks import TASKS

    if task not in TASKS:
        raise typer.BadParameter(f"{task!r}, expected one of {', '.join(TASKS)}.", param_hint="--task")
    content = read_checkpoint(checkpoint)
    family = TASKS[task].family
    source = tokenizer or family.tokenizer
    loaded = _load_tokenizer(source, family)
    given = None if config is None else _read_config(config, TASKS[task].model_class.config_class)
    model = convert_original_checkpoint(
        content, task, config=given, heads=heads, activation=activation, image_size=image_size
    )
    processor = _make_processor(model, loaded, source, family)
    side = model.config.vision_config.image_size
    is_aligned = "space_dict" in own_tensors(content, checkpoint)
    card = create_model_card(model.config, out.name, notes=_notes(checkpoint.name, model.config, is_aligned))

    with written_in_one_step(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card.save(folder / "README.md")
    typer.echo(
        f"{out}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, images of {side} x {side}"
        " pixels."
    )
