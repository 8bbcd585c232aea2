"""FLOPs in closed form: of a model's parts, then of each task's forward pass.

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


# The forward pass of each task. `added`: by modality, what the pruning method adds.


def question_answering(config, vision_tokens, text_tokens, answer_tokens, added):
    total = vision_encoder(config, vision_tokens, added.get("vision"))
    total = total + text_encoder(config, text_tokens, [vision_tokens[-1]], added.get("text"))
    return total + text_decoder(config, answer_tokens, text_tokens[-1], config.text_config.hidden_size)


def captioning(config, vision_tokens, text_tokens, answer_tokens, added):
    total = vision_encoder(config, vision_tokens, added.get("vision"))
    return total + text_decoder(config, answer_tokens, vision_tokens[-1], config.vision_config.hidden_size)


def visual_reasoning(config, vision_tokens, text_tokens, answer_tokens, added):
    """Count NLVR2's pass over two images; `vision_tokens` is (layers + 1, 2, B)."""
    images = vision_tokens.unbind(1)
    total = sum(vision_encoder(config, image, added.get("vision")) for image in images)
    total = total + text_encoder(config, text_tokens, [image[-1] for image in images], added.get("text"))
    width = config.text_config.hidden_size
    return total + width**2 + width * 2  # the classification head


def retrieval(config, vision_tokens, text_tokens, answer_tokens, added):
    """Count the pass that matches an image and a text."""
    total = vision_encoder(config, vision_tokens, added.get("vision"))
    total = total + text_encoder(config, text_tokens, [vision_tokens[-1]], added.get("text"))
    return total + config.text_config.hidden_size * 2  # the matching head


def contrastive_pair(config, vision_tokens, text_tokens, answer_tokens, added):
    """Count CLIP's features of an image and a text, and their product.

    Causal attention counts in full, because it is computed in full.
    """
    vision, text, width = config.vision_config, config.text_config, config.projection_dim
    total = patch_embedding(vision, vision_tokens) + vision_tokens[0] * LAYER_NORM * vision.hidden_size
    total = total + pre_norm_layers(vision, vision_tokens, added.get("vision"))
    total = total + pre_norm_layers(text, text_tokens, added.get("text"))
    total = total + text_tokens[-1] * LAYER_NORM * text.hidden_size + LAYER_NORM * vision.hidden_size
    return total + (vision.hidden_size + text.hidden_size) * width + width
