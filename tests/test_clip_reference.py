"""CLIP's towers against a plain implementation that takes one sample at a time and follows the method's steps word for
word."""

import pytest
import torch

from .conftest import close
from .helpers.clip import make_clip_inputs, make_clip_model


LENGTHS = (16, 3, 9, 12, 5, 6)


def plain_layer(layer, x, projection, alignment_tokens, temperature, is_text):
    """One layer on the tokens x (L, D) of one sample: (L', D)."""
    length, attention = len(x), layer.self_attn
    mapped = projection(x)
    scores = mapped @ alignment_tokens.T  # (L, T)
    normed = layer.layer_norm1(x)
    q, k, v = (
        m(normed).view(length, attention.num_heads, -1).transpose(0, 1)
        for m in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if is_text:
        logits = logits.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    maps = logits.softmax(dim=-1)
    output = maps @ v
    x = x + attention.out_proj(output.transpose(0, 1).flatten(1))

    can_go = list(range(1, length - 1 if is_text else length))
    if len(can_go) >= 3 and temperature > 0:
        a, reader = scores[can_go], length - 1 if is_text else 0
        received = maps.max(dim=0).values[1:][:, can_go].sum(dim=0)
        norm = output[:, can_go].norm(dim=-1)
        by_reader = (maps[:, reader, can_go] * norm / norm.sum(dim=0)).sum(dim=0)
        by_alignment = a.max(dim=1).values
        importance = (received / (received.sum() + 1e-8) + by_reader + by_alignment / (by_alignment.sum() + 1e-8)) / 3
        threshold = ((a / temperature).softmax(dim=0) * importance.unsqueeze(1)).sum(dim=0).min()
        keep = importance > threshold
        if 1 < keep.sum() < len(can_go) - 1:  # more than one stays, more than one goes
            weight = importance[~keep] / importance[~keep].sum()
            tokens = x[can_go]
            merged = (weight.unsqueeze(1) * tokens[~keep]).sum(dim=0, keepdim=True)
            x = torch.cat([x[:1], tokens[keep], merged, *([x[-1:]] if is_text else [])])
    return x + layer.mlp(layer.layer_norm2(x))


def plain_tower(tower, x, projections, alignment_tokens, temperature, is_text):
    counts = [len(x)]
    for layer, projection in zip(tower.encoder.layers, projections):
        x = plain_layer(layer, x, projection, alignment_tokens, temperature, is_text)
        counts.append(len(x))
    return x, counts


@pytest.mark.parametrize("temperature", (0.0, 0.3, 3.0, 30.0))
@pytest.mark.parametrize("alignment_dim", (None, 20))
@torch.no_grad()
def test_both_towers(temperature, alignment_dim, path):
    model, inputs = make_clip_model({"alignment_dim": alignment_dim}), make_clip_inputs(LENGTHS)
    model.set_pruning(temperature=temperature)
    output = model(**inputs)
    images = model.get_image_features(inputs["pixel_values"]).pooler_output
    texts = model.get_text_features(inputs["input_ids"]).pooler_output
    alignment = model.alignment
    for row, length in enumerate(LENGTHS):
        vision, text = model.vision_model, model.text_model
        x = vision.pre_layrnorm(vision.embeddings(inputs["pixel_values"][row : row + 1]))[0]
        x, counts = plain_tower(vision, x, alignment.vision_projection, alignment.tokens, temperature, False)
        close(images[row], model.visual_projection(vision.post_layernorm(x[0])), atol=1e-4)
        assert output.vision_tokens[:, row].tolist() == counts
        x = text.embeddings(inputs["input_ids"][row : row + 1, :length])[0]
        x, counts = plain_tower(text, x, alignment.text_projection, alignment.tokens, temperature, True)
        close(texts[row], model.text_projection(text.final_layer_norm(x[-1])), atol=1e-4)
        assert output.text_tokens[:, row].tolist() == counts
    assert temperature == 0 or output.text_tokens[-1].tolist() < list(LENGTHS)
