"""MADTP that merges similar tokens: two layers against the equations, and what its models promise."""

import pytest
import torch

from madtp_hf.modeling.method_madtp import AlignmentTokens
from madtp_hf.modeling.method_madtp_merge import MadtpMergeMethod
from madtp_hf.modeling.repack import repack
from madtp_hf.modeling.token_pruning import distinctness, merge_into_similar

from .conftest import close, make_inputs, make_task_model
from .helpers.clip import make_clip_inputs, make_clip_model
from .test_token_pruning import (
    BLIP,
    CLIP_TEXT,
    OTHERS,
    attention_written_out,
    importance_written_out,
    lay_out,
    project,
    random_layer,
    removable_of,
    samples_of,
    stack,
    threshold_written_out,
)


def layer_written_out(x, states, query, key, value, alignment, temperature, spec, sizes):
    """One layer for one sample; what is left of the states, their sizes, and the attention's outputs (L, H * d)."""
    x, states, query, key, value, alignment = (t.double() for t in (x, states, query, key, value, alignment))
    tokens = list(range(*removable_of(spec, len(x)).indices(len(x))))
    outputs, statistics = attention_written_out(query, key, value, spec, sizes)
    outputs = outputs.transpose(0, 1).flatten(1)
    if not tokens:
        return states, sizes, outputs
    a, s = importance_written_out(x, alignment, statistics, tokens)
    keys = key.mean(dim=0)[tokens]

    def similarity(i, j):
        return float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm())

    number = range(len(tokens))
    distinct = [s[i] * (1 - max((similarity(i, j) for j in number if s[j] > s[i]), default=-1)) for i in number]
    theta = threshold_written_out(a, distinct, temperature)
    kept = [i for i in number if distinct[i] > theta]
    dropped = [i for i in number if i not in kept]
    if not kept or len(dropped) <= 1:
        return states, sizes, outputs
    sums, counts = states * sizes[:, None], sizes.clone()
    for i in dropped:
        like = max(kept, key=lambda j: similarity(i, j))
        count = sizes[tokens[i]] * min(1, max(s[i], 0) / max(s[like], 1e-8))  # scores may be negative
        sums[tokens[like]] += count * states[tokens[i]]
        counts[tokens[like]] += count
    left = [n for n in range(len(x)) if n - tokens[0] not in dropped]
    return (sums / counts[:, None])[left], counts[left], outputs


def next_layer(states, like, seed=1):
    """Queries, keys and values (3, H, L, d) of a next layer: random maps of its input (L, D)."""
    heads, _, width = like.shape
    maps = torch.randn(3, states.shape[1], heads * width, generator=torch.Generator().manual_seed(seed))
    projected = states @ maps.to(states) / states.shape[1] ** 0.5
    return projected.unflatten(2, (heads, width)).transpose(1, 2)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 50.0])
@pytest.mark.parametrize("neighbours", [(), (6, 14, 23), (3, 2, 9)], ids=str)
@pytest.mark.parametrize("spec", [BLIP, CLIP_TEXT, *OTHERS], ids=str)
def test_two_layers_follow_the_equations_padded_or_not(temperature, neighbours, spec, path):
    lengths = (19, *neighbours)
    layers = [random_layer(length, seed=20 + length)[:5] for length in lengths]
    alignment, like = random_layer()[-1], layers[0][2]
    expected = []
    for layer in layers:
        ones = torch.ones(len(layer[0])).double()
        states, sizes, _ = layer_written_out(*layer, alignment, temperature, spec, ones)
        after = layer_written_out(states, states, *next_layer(states, like), alignment, temperature, spec, sizes)
        expected.append((states, *after))
    assert any(len(states) < length for (states, *_), length in zip(expected, lengths))
    for kind in ("padded", "varlen"):
        method = MadtpMergeMethod(spec, {"temperature": temperature}, AlignmentTokens(alignment, weight=alignment))
        x, sequences = lay_out(stack([layer[0] for layer in layers]), lengths, kind)
        states, _ = lay_out(stack([layer[1] for layer in layers]), lengths, kind)
        attended = method.attend(0, project(layers, kind), method.read_input(0, x, sequences)[0], sequences, 0.0)
        states, sequences, _ = repack(states, sequences, attended, spec)
        for mine, (of_first, *_) in zip(samples_of(states, sequences), expected, strict=True):
            torch.testing.assert_close(mine, of_first.float(), atol=1e-5, rtol=1e-5)
        query_key_value = next_layer(states, like).permute(2, 0, 1, 3)
        scores, _ = method.read_input(1, states, sequences)
        attended = method.attend(1, query_key_value, scores, sequences, 0.0)
        outputs = samples_of(attended.output, sequences)
        states, sequences, _ = repack(states, sequences, attended, spec)
        found = zip(samples_of(states, sequences), samples_of(sequences.sizes, sequences), outputs)
        for mine, (_, *of_second) in zip(found, expected, strict=True):
            for tensor, theirs in zip(mine, of_second, strict=True):
                torch.testing.assert_close(tensor, theirs.float(), atol=1e-5, rtol=1e-5)


def test_distinctness_by_hand():
    similarity = torch.tensor([[[1.0, 0.9, 0.2], [0.9, 1.0, 0.5], [0.2, 0.5, 1.0]]])
    importance = torch.tensor([[0.2, 0.5, 0.3]])
    torch.testing.assert_close(distinctness(importance, similarity), torch.tensor([[0.1, 2.0, 0.5]]))
    equal = torch.full((1, 3), 0.3)  # none is more important
    assert (distinctness(equal, similarity) == 2).all()
    mask = torch.tensor([[True, False, True]])  # padding makes nothing redundant
    assert distinctness(importance * mask, similarity, mask)[0, 0].item() == pytest.approx(0.8)


def test_merging_by_hand():
    similarity = torch.tensor([[[1.0, 0.9, 0.2, 0.0], [0.9, 1.0, 0.5, 0.1], [0.2, 0.5, 1.0, 0.9], [0, 0.1, 0.9, 1]]])
    importance, sizes = torch.tensor([[0.1, 0.4, 0.2, 0.3]]), torch.tensor([[2.0, 1.0, 3.0, 1.0]])
    stays = torch.tensor([[False, True, True, False]])
    into, weight, new = merge_into_similar(importance, similarity, sizes, stays)
    assert into[0, 0] == 1 and into[0, 3] == 2
    # Two tokens of a quarter of the importance count as half a token; one that is more important than what it is
    # merged into counts as itself.
    torch.testing.assert_close(new[stays], torch.tensor([1.5, 4.0]))
    torch.testing.assert_close(weight, torch.tensor([[0.5 / 1.5, 0, 0, 1 / 4]]))


@torch.no_grad()
def test_clip_prunes_both_towers_and_not_by_the_batch(path):
    model, inputs = make_clip_model(), make_clip_inputs((9, 5, 12, 7))
    model.set_pruning_method("madtp_merge")
    model.set_pruning(temperature=3.0)
    together = model(**inputs)
    for tokens in (together.vision_tokens, together.text_tokens):
        assert (tokens[-1] < tokens[0]).any()
    alone = model(**{name: value[1:2, :5] if value.ndim == 2 else value[1:2] for name, value in inputs.items()})
    close(alone.text_embeds, together.text_embeds[1:2], atol=1e-4)
    close(alone.image_embeds, together.image_embeds[1:2], atol=1e-4)


@torch.no_grad()
def test_sizes_weight_attention_behind_the_layers_that_prune():
    """With pruning in the first layer alone, the others weight keys by size, with maps and without."""
    model, inputs = make_task_model("vqa", pruning_layers=1), make_inputs()
    model.set_pruning_method("madtp_merge")
    model.set_pruning(temperature=3.0)
    output = model(**inputs)
    assert (output.vision_tokens[1] < output.vision_tokens[0]).any()
    assert torch.equal(output.vision_tokens[1], output.vision_tokens[-1])
    with_maps = model(**inputs, output_attentions=True)
    close(with_maps.logits, output.logits, atol=1e-4)


@torch.no_grad()
def test_sizes_are_counted_in_float32_whatever_the_default():
    model, inputs = make_task_model("vqa"), make_inputs()
    model.set_pruning_method("madtp_merge")
    model.set_pruning(temperature=3.0)
    expected = model(**inputs).logits
    torch.set_default_dtype(torch.bfloat16)
    try:
        close(model(**inputs).logits, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_method_of_before_sizes_is_told_what_to_return():
    with pytest.raises(TypeError, match=r"attention_bias is never called: return the sizes in `Decision\.sizes`"):

        class _Biased(MadtpMergeMethod):
            def attention_bias(self, layer, chunk):
                return None
