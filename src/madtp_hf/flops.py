"""FLOPs of a forward pass in closed form, from the number of tokens in each layer.

The paper's convention: one multiply-accumulate of a convolution, a linear map or an attention product counts as one FLOP, a layer norm
as five an element, the alignment scores as the linear map they are. Nothing is run and nothing is traced.
"""

import itertools

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from .modeling.madtp_blip_encoders import MERGE_FROM_LAYER


TASKS = ("vqa", "captioning", "nlvr2", "retrieval")
LAYER_NORM = 5


if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
    # torch's own counter leaves fused attention out on the CPU alone: with this, what it measures can be held against what is counted here.
    @register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    def _cpu_attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query_shape, key_shape, value_shape)


def _alignment(tokens, width, config):
    """The alignment scores of a layer that `tokens` enter, the class token among them."""
    alignment_width = config.alignment_dim or config.text_config.hidden_size
    projection = width * alignment_width if alignment_width != width else 0
    return (tokens - 1) * (config.num_alignment_tokens * alignment_width + projection)


def _vision(config, tokens, aligned):
    vision = config.vision_config
    width, hidden = vision.hidden_size, vision.intermediate_size
    total = (tokens[0] - 1) * 3 * vision.patch_size**2 * width
    for enter, leave in itertools.pairwise(tokens):
        total = total + enter * (4 * width**2 + LAYER_NORM * width) + 2 * enter**2 * width
        total = total + leave * (2 * width * hidden + LAYER_NORM * width)
        if aligned:
            total = total + _alignment(enter, width, config)
    return total + tokens[-1] * LAYER_NORM * width


def _cross_attention(width, queries, context, context_width):
    return queries * 2 * width**2 + context * 2 * context_width * width + 2 * queries * context * width


def _text_encoder(config, tokens, image_tokens, aligned):
    """`image_tokens`: one (B,) tensor for each image that the text meets."""
    text = config.text_config
    width, hidden, image_width = text.hidden_size, text.intermediate_size, config.vision_config.hidden_size
    total = tokens[0] * LAYER_NORM * width
    for layer, (enter, leave) in enumerate(itertools.pairwise(tokens)):
        total = total + enter * (4 * width**2 + LAYER_NORM * width) + 2 * enter**2 * width
        if aligned:
            total = total + _alignment(enter, width, config)
        for image in image_tokens:
            total = total + _cross_attention(width, leave, image, image_width)
        if len(image_tokens) == 2 and layer >= MERGE_FROM_LAYER:
            total = total + leave * 2 * width**2  # the merge layer
        total = total + leave * (2 * width * hidden + 2 * LAYER_NORM * width)
    return total


def _text_decoder(config, tokens, context_tokens, context_width):
    """`tokens` read in one pass, with a cross-attention to `context_tokens` in every layer, and the scores over the vocabulary."""
    text = config.text_config
    width, hidden = text.hidden_size, text.intermediate_size
    layer = tokens * (4 * width**2 + 2 * width * hidden + 3 * LAYER_NORM * width) + 2 * tokens**2 * width
    layer = layer + _cross_attention(width, tokens, context_tokens, context_width)
    head = tokens * (width**2 + width * text.vocab_size + LAYER_NORM * width)
    return (tokens * LAYER_NORM * width + text.num_hidden_layers * layer + head) * (tokens > 0)


def _count(config, task, vision_tokens, text_tokens, answer_tokens, pruning) -> torch.FloatTensor:
    if task not in TASKS:
        raise ValueError(f"task={task!r}: expected one of {', '.join(map(repr, TASKS))}.")
    vision_tokens = torch.as_tensor(vision_tokens).float()
    answer_tokens = torch.as_tensor(answer_tokens).to(vision_tokens)
    branches = [("vision_tokens", vision_tokens, config.vision_config)]
    if task != "captioning":
        if text_tokens is None:
            raise ValueError(f"text_tokens is missing: task {task!r} has a text encoder.")
        text_tokens = torch.as_tensor(text_tokens).to(vision_tokens)
        branches.append(("text_tokens", text_tokens, config.text_config))
    for name, tokens, branch in branches:
        if len(tokens) != branch.num_hidden_layers + 1:
            raise ValueError(
                f"{name} has {len(tokens)} rows: expected one more than layers, {branch.num_hidden_layers + 1}."
            )

    text_width, image_width = config.text_config.hidden_size, config.vision_config.hidden_size
    vision_aligned, text_aligned = (pruning and branch in config.pruning_modalities for branch in ("vision", "text"))
    if task == "nlvr2":
        if vision_tokens.ndim != 3 or vision_tokens.shape[1] != 2:
            raise ValueError(
                f"vision_tokens has shape {tuple(vision_tokens.shape)}: expected (layers + 1, 2, batch_size) for task 'nlvr2'."
            )
        images = vision_tokens.unbind(1)
        total = sum(_vision(config, image, vision_aligned) for image in images)
        total = total + _text_encoder(config, text_tokens, [image[-1] for image in images], text_aligned)
        return total + text_width**2 + text_width * 2  # and what says true or false
    images = [vision_tokens[-1]]
    total = _vision(config, vision_tokens, vision_aligned)
    if task == "captioning":
        return total + _text_decoder(config, answer_tokens, *images, image_width)
    total = total + _text_encoder(config, text_tokens, images, text_aligned)
    if task == "retrieval":
        return total + text_width * 2  # whether they match
    return total + _text_decoder(config, answer_tokens, text_tokens[-1], text_width)


def count_flops(config, task: str, vision_tokens, text_tokens=None, answer_tokens=0) -> torch.FloatTensor:
    """Multiply-accumulates of each sample's inference forward pass.

    Args:
        config (`MadtpBlipConfig`):
            The model's; the alignment scores count where its temperature is above 0.
        task (`str`):
            `"vqa"`, `"captioning"`, `"nlvr2"` or `"retrieval"`, the last meaning the pass that matches an image and a text.
        vision_tokens (`torch.LongTensor` of shape `(layers + 1, batch_size)`, for NLVR2 `(layers + 1, 2, batch_size)`):
            As in the model's outputs: what enters the encoder, then what each layer leaves.
        text_tokens (`torch.LongTensor` of shape `(layers + 1, batch_size)`, *optional*):
            Likewise; captioning has none.
        answer_tokens (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*, defaults to 0):
            How many tokens the decoder of an answer or a caption reads, in one pass; 0 leaves it out.

    Returns:
        `torch.FloatTensor` of shape `(batch_size,)`.
    """
    return _count(config, task, vision_tokens, text_tokens, answer_tokens, pruning=config.pruning_temperature > 0)


def reduction_of_flops(config, task: str, vision_tokens, text_tokens=None, answer_tokens=0) -> torch.FloatTensor:
    """1 - FLOPs(pruned) / FLOPs(dense) of each sample, (batch_size,): dense is what enters the encoders staying to the end."""
    pruned = count_flops(config, task, vision_tokens, text_tokens, answer_tokens)
    dense_vision = vision_tokens[:1].expand_as(vision_tokens)
    dense_text = None if text_tokens is None else text_tokens[:1].expand_as(text_tokens)
    return 1 - pruned / _count(config, task, dense_vision, dense_text, answer_tokens, pruning=False)
