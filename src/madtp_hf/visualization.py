"""Pictures of what pruning leaves."""

import torch
from PIL import Image, ImageDraw


@torch.no_grad()
def draw_surviving_patches(model, processor, images, questions, layers=None, size: int = 160) -> Image.Image:
    """Draw which patches of each image are left after each layer; those that were merged away are dimmed.

    Args:
        model (`MadtpBlipForQuestionAnswering`):
            The model, with pruning as it is to be drawn.
        processor (`BlipProcessor`):
            Its processor.
        images (`list[PIL.Image.Image]`), questions (`list[str]`):
            The images, a row each, and the question asked about each.
        layers (`list[int]`, *optional*):
            The vision layers to draw, from 1 on; all if not given.
        size (`int`, *optional*, defaults to 160):
            The width of a drawn image, in pixels.

    Returns:
        `PIL.Image.Image`: the image itself in the first column, then a column for each layer.
    """
    inputs = processor(images=images, text=questions, padding=True, return_tensors="pt").to(model.device)
    start = torch.full((len(images), 1), model.config.text_config.bos_token_id, device=model.device)
    output = model(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        pixel_values=inputs.pixel_values.to(model.dtype),
        decoder_input_ids=start,
        output_positions=True,
    )
    layers = list(range(1, len(output.vision_positions))) if layers is None else list(layers)
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size

    gap, caption = 6, 16
    canvas = Image.new("RGB", ((len(layers) + 1) * (size + gap), len(images) * (size + 2 * caption)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (image, question) in enumerate(zip(images, questions)):
        top = row * (size + 2 * caption)
        picture = image.convert("RGB").resize((size, size), Image.Resampling.NEAREST)
        faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.8)
        draw.text((2, top + 1), question, fill="black")
        canvas.paste(picture, (0, top + caption))
        for column, layer in enumerate(layers, start=1):
            left = column * (size + gap)
            positions = output.vision_positions[layer][row]
            kept = torch.zeros(grid * grid + 1, dtype=torch.uint8)
            kept[positions[positions > 0].cpu()] = 255
            patches = Image.fromarray(kept[1:].view(grid, grid).numpy())
            patches = patches.resize(picture.size, Image.Resampling.NEAREST)
            canvas.paste(Image.composite(picture, faded, patches), (left, top + caption))
            draw.text(
                (left, top + 1 + caption + size),
                f"layer {layer}: {output.vision_tokens[layer, row]} tokens",
                fill="black",
            )
    return canvas
