"""Pictures of what pruning leaves."""

import torch
from PIL import Image, ImageDraw

from .modeling.pipeline_madtp_blip import read_image


_GAP, _CAPTION = 6, 16  # pixels between columns, and for a line of text


def _check_layers(layers, num_layers: int) -> list[int]:
    """The layers to draw; a `ValueError` for one that the model doesn't have."""
    layers = list(range(1, num_layers + 1)) if layers is None else list(layers)
    exist = f"0 (what enters the encoder) to {num_layers}"
    if not layers:
        raise ValueError(f"layers is empty: expected some of the layers {exist}, or None for 1 to {num_layers}.")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer <= num_layers:
            raise ValueError(f"layers has {layer!r}: expected whole numbers, the model's vision layers are {exist}.")
    return layers


def _read_samples(images, texts, images_per_sample: int) -> list[list[Image.Image]]:
    """The images of each sample, opened; a `ValueError` unless there is a text for each sample."""
    expected = "a list of images" if images_per_sample == 1 else "a list of pairs (left image, right image)"
    for name, value in (("images", images), ("questions", texts)):
        if isinstance(value, str) or not hasattr(value, "__len__") or len(value) == 0:
            shown = "an empty list" if hasattr(value, "__len__") and len(value) == 0 else f"a {type(value).__name__}"
            raise ValueError(f"{name} is {shown}: expected {expected if name == 'images' else 'a list of strings'}.")
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images or pairs for {len(texts)} questions: expected one text for each.")
    if images_per_sample == 1:
        return [[read_image(image)] for image in images]
    for index, pair in enumerate(images):
        if not isinstance(pair, (list, tuple)) or len(pair) != images_per_sample:
            raise ValueError(
                f"images[{index}] is no pair: expected {expected}, as this model reads two images a text."
            )
    return [[read_image(image) for image in pair] for pair in images]


def _run(model, processor, samples: list[list[Image.Image]], texts):
    """The model's output with positions; every task's forward, without labels."""
    flat = [image for sample in samples for image in sample]
    pixel_values = processor.image_processor(images=flat, return_tensors="pt").pixel_values
    if len(samples[0]) > 1:
        pixel_values = pixel_values.unflatten(0, (len(samples), -1))
    text = processor.tokenizer(list(texts), padding=True, return_tensors="pt").to(model.device)
    inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    if model.task == "vqa":  # its forward scores an answer
        start = model.config.text_config.bos_token_id
        inputs["decoder_input_ids"] = torch.full((len(samples), 1), start, device=model.device)
    return model(**inputs, pixel_values=pixel_values.to(model.device, model.dtype), output_positions=True)


def _draw_kept(picture: Image.Image, positions: torch.Tensor, grid: int) -> Image.Image:
    """Dim the patches of the picture that are not among the positions (length,); patch n of the input is n, from 1."""
    faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.8)
    kept = torch.zeros(grid * grid + 1, dtype=torch.uint8)
    kept[positions[positions > 0].cpu()] = 255
    patches = Image.fromarray(kept[1:].view(grid, grid).numpy())
    return Image.composite(picture, faded, patches.resize(picture.size, Image.Resampling.NEAREST))


@torch.no_grad()
def draw_surviving_patches(model, processor, images, questions, layers=None, size: int = 160) -> Image.Image:
    """Draw which patches of each image are left after each layer; those that were merged away are dimmed.

    Args:
        model (`MadtpBlipPreTrainedModel`):
            The model, of any task, with pruning as it is to be drawn.
        processor (`BlipProcessor`):
            Its processor.
        images (`list`):
            The images, a row each: PIL images, arrays or paths. Of a model that reads two images a text (NLVR2), pairs
            `(left, right)`, two rows each.
        questions (`list[str]`):
            The text of each: a question, a sentence, a caption or, of captioning, a prompt.
        layers (`list[int]`, *optional*):
            The vision layers to draw: 1 to the number of layers, all of these if not given, and 0 for what enters the
            encoder, all patches.
        size (`int`, *optional*, defaults to 160):
            The width of a drawn image, in pixels.

    Returns:
        `PIL.Image.Image`: the image itself in the first column, then a column for each layer.

    Raises:
        ValueError: for a layer that the model doesn't have, empty lists, or lists that don't fit each other.
    """
    layers = _check_layers(layers, model.config.vision_config.num_hidden_layers)
    samples = _read_samples(images, questions, 2 if model.task == "nlvr2" else 1)
    output = _run(model, processor, samples, questions)
    counts = output.vision_tokens  # (layers + 1, B), or (layers + 1, 2, B)
    if counts.ndim == 3:  # as positions lie: left and right in turn
        counts = counts.transpose(1, 2).flatten(1)
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size

    height = size + 2 * _CAPTION
    pictures = [image for sample in samples for image in sample]
    canvas = Image.new("RGB", ((len(layers) + 1) * (size + _GAP), len(pictures) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, picture in enumerate(pictures):
        top = row * height
        sample, side = divmod(row, len(samples[0]))
        picture = picture.resize((size, size), Image.Resampling.NEAREST)
        draw.text((2, top + 1), questions[sample] if side == 0 else "(right image)", fill="black")
        canvas.paste(picture, (0, top + _CAPTION))
        for column, layer in enumerate(layers, start=1):
            left = column * (size + _GAP)
            canvas.paste(_draw_kept(picture, output.vision_positions[layer][row], grid), (left, top + _CAPTION))
            name = f"layer {layer}" if layer else "input"
            draw.text((left, top + 1 + _CAPTION + size), f"{name}: {counts[layer, row]} tokens", fill="black")
    return canvas
