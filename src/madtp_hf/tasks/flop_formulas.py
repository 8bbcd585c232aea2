"""FLOPs in closed form of a model's parts, of which each task's file makes those of its forward pass.

In the paper's convention, one multiply-accumulate of a convolution, a linear map or an attention product counts as one
FLOP, and a layer norm as five FLOPs per element. `tokens` is a float tensor (layers + 1, B): the number of tokens that
enter a branch, then that each of its layers leaves. `added(layer, tokens)` counts what the pruning method adds to a
layer of the branch; None adds nothing. Results are (B,).
"""

import itertools

from ..modeling.madtp_blip_encoders import MERGE_FROM_LAYER


LAYER_NORM = 5


def pre_norm_layers(branch, tokens, added):
    """Count the FLOPs of the layers of BLIP's vision encoder or of a CLIP tower."""
    width, hidden, total = branch.hidden_size, branch.intermediate_size, 0
    for layer, (enter, leave) in enumerate(itertools.pairwise(tokens)):
        total = total + enter * (4 * width**2 + LAYER_NORM * width) + 2 * enter**2 * width
        total = total + leave * (2 * width * hidden + LAYER_NORM * width)
        if added is not None:
            total = total + added(layer, enter)
    return total


def patch_embedding(vision, tokens):
    return (tokens[0] - 1) * 3 * vision.patch_size**2 * vision.hidden_size


def vision_encoder(config, tokens, added):
    vision = config.vision_config
    total = patch_embedding(vision, tokens) + pre_norm_layers(vision, tokens, added)
    return total + tokens[-1] * LAYER_NORM * vision.hidden_size


def cross_attention(width, queries, context, context_width):
    return queries * 2 * width**2 + context * 2 * context_width * width + 2 * queries * context * width


def text_encoder(config, tokens, image_tokens, added):
    """Count the FLOPs of the text encoder; `image_tokens` holds a (B,) tensor for each image it cross-attends to."""
    text = config.text_config
    width, hidden, image_width = text.hidden_size, text.intermediate_size, config.vision_config.hidden_size
    total = tokens[0] * LAYER_NORM * width
    for layer, (enter, leave) in enumerate(itertools.pairwise(tokens)):
        total = total + enter * (4 * width**2 + LAYER_NORM * width) + 2 * enter**2 * width
        if added is not None:
            total = total + added(layer, enter)
        for image in image_tokens:
            total = total + cross_attention(width, leave, image, image_width)
        if len(image_tokens) == 2 and layer >= MERGE_FROM_LAYER:
            total = total + leave * 2 * width**2  # the merge layer
        total = total + leave * (2 * width * hidden + 2 * LAYER_NORM * width)
    return total


def text_decoder(config, tokens, context_tokens, context_width):
    """Count a text decoder's pass over `tokens` (B,), its word logits included.

    It cross-attends to `context_tokens` in every layer.
    """
    text = config.text_config
    width, hidden = text.hidden_size, text.intermediate_size
    layer = tokens * (4 * width**2 + 2 * width * hidden + 3 * LAYER_NORM * width) + 2 * tokens**2 * width
    layer = layer + cross_attention(width, tokens, context_tokens, context_width)
    head = tokens * (width**2 + width * text.vocab_size + LAYER_NORM * width)
    return (tokens * LAYER_NORM * width + text.num_hidden_layers * layer + head) * (tokens > 0)
