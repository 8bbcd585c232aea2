"""Show which patches and words pruning keeps, layer by layer, as data and as pictures."""

import html
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from ..budgets.evaluation import record_branches
from ..budgets.passes import encode
from ..modeling.images import read_image
from ..modeling.texts import tokenize
from ..tasks import TASKS


_GAP, _CAPTION = 6, 16  # pixels between columns, and for a line of text
_FONT_SIZE, _LINE, _PAD = 15, 24, 6  # of a table of words
_CELL = "border: none; padding: 1px 12px 1px 0; white-space: nowrap"  # overrides the page's own style
_STAYS, _GOES, _HEAD = (20, 20, 20), (200, 200, 200), (110, 110, 110)


class Words(NamedTuple):
    """Which tokens of one text survive: row 0 is the input of the text encoder, row l what layer l leaves.

    tokens: the text's n tokens, without padding; stays (layers + 1, n) bool; counts (layers + 1,) int64: the number of
    tokens, the merged one included.
    """

    tokens: list[str]
    stays: torch.Tensor
    counts: torch.Tensor


class Survivors(NamedTuple):
    """What survives of one sample: row 0 is the input of an encoder, row l what layer l leaves.

    pictures: the sample's images as the model sees them, resized and cropped; patches (images, layers + 1, grid, grid)
    bool; counts (images, layers + 1) int64: the number of tokens, the class token and the merged one included; words:
    None without a text encoder.
    """

    pictures: list[Image.Image]
    patches: torch.Tensor
    counts: torch.Tensor
    words: Words | None


def _check_layers(layers, num_layers: int, branch: str = "vision") -> list[int]:
    """Return the layers to draw; raise a `ValueError` for one that the model doesn't have."""
    layers = list(range(1, num_layers + 1)) if layers is None else list(layers)
    exist = f"0 (what enters the encoder) to {num_layers}"
    if not layers:
        raise ValueError(f"layers is empty: expected some of the layers {exist}, or None for 1 to {num_layers}.")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer <= num_layers:
            raise ValueError(f"layers has {layer!r}: expected whole numbers, the model's {branch} layers are {exist}.")
    return layers


def _read_samples(images, texts, number: int) -> list[list[Image.Image]]:
    """Open the images of each sample; raise a `ValueError` unless there is one text per sample."""
    expected = "a list of images" if number == 1 else "a list of pairs (left image, right image)"
    for name, value, what in (("images", images, expected), ("questions", texts, "a list of strings")):
        if isinstance(value, str) or not hasattr(value, "__len__") or len(value) == 0:
            shown = "an empty list" if hasattr(value, "__len__") and len(value) == 0 else f"a {type(value).__name__}"
            raise ValueError(f"{name} is {shown}: expected {what}.")
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images or pairs for {len(texts)} questions: expected one text for each.")
    samples = [[image] for image in images] if number == 1 else images
    for index, (sample, text) in enumerate(zip(samples, texts)):
        if not isinstance(text, str):
            raise ValueError(f"questions[{index}] is a {type(text).__name__}: expected a string.")
        if not isinstance(sample, (list, tuple)) or len(sample) != number:
            raise ValueError(f"images[{index}] is not a pair: expected {expected}, as this model reads {number}.")
    return [[read_image(image) for image in sample] for sample in samples]


def preprocess(model, processor, images, texts) -> tuple[dict[str, torch.Tensor], list[Image.Image]]:
    """Preprocess a batch.

    Returns the inputs of `forward`, on the model's device, and all images, in order, as the model sees them.
    """
    samples = _read_samples(images, texts, TASKS[model.task].num_images)
    flat = [image for sample in samples for image in sample]
    pixel_values = processor.image_processor(images=flat, return_tensors="pt").pixel_values
    # Resized and cropped as for the model, so that patches lie where they are drawn.
    seen = processor.image_processor(images=flat, do_rescale=False, do_normalize=False, return_tensors="pt")
    seen = seen.pixel_values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    if len(samples[0]) > 1:
        pixel_values = pixel_values.unflatten(0, (len(samples), -1))
    longest = model.config.text_config.max_position_embeddings
    text = tokenize(processor.tokenizer, list(texts), longest, None, padding=True, return_tensors="pt").to(
        model.device
    )
    batch = {
        "input_ids": text.input_ids,
        "attention_mask": text.attention_mask,
        "pixel_values": pixel_values.to(model.device, model.dtype),
    }
    return batch, [Image.fromarray(picture.numpy()) for picture in seen.cpu()]


def _find(positions: torch.Tensor, number: int) -> torch.Tensor:
    """Return which input tokens survive, (number,) bool, by positions (length,); -1 marks tokens not of the input."""
    stays = torch.zeros(number, dtype=torch.bool)
    stays[positions[(positions >= 0) & (positions < number)].cpu()] = True
    return stays


def collect_survivors(model, processor, batch, pictures, outputs) -> list[Survivors]:
    """Return what survives of each sample of a batch from [`preprocess`], by the outputs of [`record_branches`]."""
    vision, text = outputs["vision"], outputs.get("text")
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    patches = torch.stack(
        [torch.stack([_find(row, side * side + 1)[1:] for row in layer]) for layer in vision.positions]
    ).unflatten(2, (side, side))  # (layers + 1, all images, side, side)
    per_sample = TASKS[model.task].num_images
    found = []
    for index in range(len(pictures) // per_sample):
        own = slice(index * per_sample, (index + 1) * per_sample)
        words = None
        if text is not None:
            ids = batch["input_ids"][index][batch["attention_mask"][index].bool()]
            tokens = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
            stays = torch.stack([_find(layer[index], len(tokens)) for layer in text.positions])
            words = Words(tokens, stays, text.num_tokens[:, index].cpu())
        counts = vision.num_tokens[:, own].T.cpu()
        found.append(Survivors(pictures[own], patches[:, own].transpose(0, 1), counts, words))
    return found


@torch.no_grad()
def find_survivors(model, processor, images, questions) -> list[Survivors]:
    """Find which patches and words each layer of a model keeps; return one `Survivors` per sample.

    Args:
        model, processor, images, questions: As [`draw_surviving_patches`] takes them. With pruning off, all patches
            and words stay.

    Raises:
        ValueError: for empty lists, or lists that don't match each other.
    """
    batch, pictures = preprocess(model, processor, images, questions)
    with record_branches(model, positions=True) as outputs:
        encode(model, batch)
    return collect_survivors(model, processor, batch, pictures, outputs)


def _draw_kept(picture: Image.Image, kept: torch.Tensor) -> Image.Image:
    """Dim the patches of a picture that are not kept (side, side)."""
    faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.8)
    mask = Image.fromarray(kept.numpy().astype("uint8") * 255)
    return Image.composite(picture, faded, mask.resize(picture.size, Image.Resampling.NEAREST))


def draw_patches(samples: list[Survivors], questions=None, layers=None, size: int = 160) -> Image.Image:
    """Draw what [`find_survivors`] returned, with the questions above the images if they are given."""
    layers = _check_layers(layers, samples[0].patches.shape[1] - 1)
    above = _CAPTION if questions is not None else 0
    height = size + above + _CAPTION
    rows = [(sample, image) for sample in range(len(samples)) for image in range(len(samples[sample].pictures))]
    canvas = Image.new("RGB", ((len(layers) + 1) * (size + _GAP), len(rows) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (sample, image) in enumerate(rows):
        top = row * height
        found = samples[sample]
        picture = found.pictures[image].resize((size, size), Image.Resampling.NEAREST)
        if questions is not None:
            draw.text((2, top + 1), questions[sample] if image == 0 else "(right image)", fill="black")
        canvas.paste(picture, (0, top + above))
        for column, layer in enumerate(layers, start=1):
            left = column * (size + _GAP)
            canvas.paste(_draw_kept(picture, found.patches[image, layer]), (left, top + above))
            name = f"layer {layer}" if layer else "input"
            text = f"{name}: {found.counts[image, layer]} tokens"
            draw.text((left, top + 1 + above + size), text, fill="black")
    return canvas


def draw_surviving_patches(model, processor, images, questions, layers=None, size: int = 160) -> Image.Image:
    """Draw which patches of each image survive each layer; dropped patches are dimmed.

    Args:
        model (`MadtpBlipPreTrainedModel` or `MadtpClipModel`): The model, of any task; its current pruning applies.
            With pruning off, all patches stay.
        processor (`BlipProcessor` or `CLIPProcessor`): Its processor.
        images (`list`): The images, one row each: PIL images, arrays or paths. For a model that reads two images per
            text (NLVR2), pairs `(left, right)`, two rows each. They are drawn as the model sees them, resized and
            cropped.
        questions (`list[str]`): A text for each: a question, a sentence, a caption or, for captioning, a prompt.
        layers (`list[int]`, *optional*): The vision layers to draw: 1 to the number of layers, by default all of
            these; 0 is the encoder's input, all patches.
        size (`int`, *optional*, defaults to 160): The width of a drawn image, in pixels.

    Returns:
        `PIL.Image.Image`: the image itself in the first column, then a column for each layer.

    Raises:
        ValueError: for a layer that the model doesn't have, empty lists, or lists that don't match each other.
    """
    return draw_patches(find_survivors(model, processor, images, questions), questions, layers, size)


def surviving_words(model, processor, images, texts) -> list[Words]:
    """Find which tokens of each text survive each layer, as data.

    Args:
        model (`MadtpBlipPreTrainedModel` or `MadtpClipModel`): The model, of any task but captioning, which has no
            text encoder. With pruning off, all words stay.
        processor, images, texts: As [`draw_surviving_patches`] takes processor, images and questions. Except for CLIP,
            what survives of a text also depends on its image, through cross-attention.

    Returns:
        `list[Words]`, one per text: `tokens`, and `stays` of shape `(layers + 1, number of tokens)`, True where a
        token survives. A text's first token and CLIP's end of text always survive.

    Raises:
        ValueError: for a model without a text encoder, empty lists, or lists that don't match each other.
    """
    if not TASKS[model.task].text_encoder:
        raise ValueError(
            f"{type(model).__name__} has no text encoder, so it drops no words: expected a model for another"
            " task; draw_surviving_patches draws its patches."
        )
    found = (sample.words for sample in find_survivors(model, processor, images, texts))
    return [words for words in found if words is not None]


def _table(words: Words, layers: list[int]) -> list[tuple[str, list[bool], str]]:
    """Return the rows of a table: the layer's name, which tokens survive, and how many tokens there are."""
    names = [f"layer {layer}" if layer else "input" for layer in layers]
    return [(name, words.stays[layer].tolist(), f"{words.counts[layer]} tokens") for name, layer in zip(names, layers)]


def draw_surviving_words(model, processor, images, texts, layers=None) -> Image.Image:
    """Draw which tokens of each text survive each layer; dropped tokens are grey and struck out.

    Args:
        model, processor, images, texts: As [`surviving_words`] takes them.
        layers (`list[int]`, *optional*): The text layers to draw: 1 to the number of layers, by default all of these;
            0 is the encoder's input.

    Returns:
        `PIL.Image.Image`: one table per text, one below the other.

    Raises:
        ValueError: for a layer that the model doesn't have, and as [`surviving_words`].
    """
    words = surviving_words(model, processor, images, texts)
    layers = _check_layers(layers, len(words[0].counts) - 1, "text")
    font = ImageFont.load_default(_FONT_SIZE)
    first = int(font.getlength("layer 00")) + 2 * _PAD
    widths = [[int(font.getlength(token)) + 2 * _PAD for token in of_text.tokens] for of_text in words]
    width = first + max(map(sum, widths)) + int(font.getlength("000 tokens")) + 2 * _PAD
    block = len(layers) * _LINE + 2 * _GAP
    canvas = Image.new("RGB", (width, len(words) * block), "white")
    draw = ImageDraw.Draw(canvas)
    for index, of_text in enumerate(words):
        for row, (name, stays, count) in enumerate(_table(of_text, layers)):
            middle = index * block + _GAP + row * _LINE + _LINE // 2
            draw.text((_PAD, middle), name, fill=_HEAD, font=font, anchor="lm")
            left = first
            for token, stay, wide in zip(of_text.tokens, stays, widths[index]):
                draw.text((left + _PAD, middle), token, fill=_STAYS if stay else _GOES, font=font, anchor="lm")
                if not stay:
                    draw.line((left + _PAD, middle, left + wide - _PAD, middle), fill=_GOES)
                left += wide
            draw.text((left + _PAD, middle), count, fill=_HEAD, font=font, anchor="lm")
    return canvas


def words_as_html(words: Words, layers=None) -> str:
    """Return the table of [`draw_surviving_words`] for one text as an HTML `<table>`, dropped words in `<del>`."""
    rows = []
    for name, stays, count in _table(words, _check_layers(layers, len(words.counts) - 1, "text")):
        tokens = [html.escape(token) for token in words.tokens]
        cells = [token if stay else f'<del style="opacity: 0.4">{token}</del>' for token, stay in zip(tokens, stays)]
        row = [f"<small>{name}</small>", *cells, f"<small>{count}</small>"]
        rows.append("".join(f'<td style="{_CELL}">{cell}</td>' for cell in row))
    body = "".join(f'<tr style="border: none">{row}</tr>' for row in rows)
    table = f'<table style="border: none; border-collapse: collapse; width: auto">{body}</table>'
    return f'<div style="overflow-x: auto">{table}</div>'
