"""Tokens end to end: where each sample's are, and that no output depends on how samples are taken together, nor a linear map sees padding."""

import itertools
import re

import pytest
import torch
from torch import nn

from madtp_hf.modeling import packing
from madtp_hf.modeling.packing import Layout, pack

from .conftest import TASKS, make_task_model


LENGTHS = (9, 3, 7, 16, 5, 4, 12, 8)
SOME_LENGTHS = [
    (1,),
    (5, 5, 5),
    (4, 1, 6),
    (1, 1, 9, 1),
    (10, 3, 10, 9, 3, 1),
    (30, 2, 29, 17, 2, 16, 30, 1, 15),
    tuple(range(1, 40)),
]


def make_batch(lengths, *width, longest=None):
    """Padded random states and their mask."""
    longest = longest or max(lengths)
    padded = torch.randn(len(lengths), longest, *width)
    return padded, torch.arange(longest) < torch.tensor(lengths)[:, None]


def shares_memory(one, other):
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# States and layouts


@pytest.mark.parametrize("width", [(), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("lengths", SOME_LENGTHS, ids=str)
def test_packed_states_are_the_real_tokens_one_sample_after_the_other(lengths, width):
    padded, mask = make_batch(lengths, *width, longest=max(lengths) + 3)
    states, layout = pack(padded, mask)
    assert torch.equal(states, padded[mask])

    expected = padded[:, : max(lengths)].clone()
    expected[~mask[:, : max(lengths)]] = 0
    assert torch.equal(layout.pad(states), expected)
    assert torch.equal(layout.unpad(layout.pad(states)), states)
    assert torch.equal(layout.unpad(padded[:, : max(lengths)]), states)  # whatever is in the padding

    assert (layout.batch_size, layout.longest, layout.total) == (len(lengths), max(lengths), sum(lengths))
    assert layout.row_counts.tolist() == layout.num_tokens.tolist() == list(lengths)
    ends = list(itertools.accumulate(lengths))
    assert layout.starts.tolist() == [0, *ends[:-1]]
    assert layout.boundaries.tolist() == [0, *ends] and layout.boundaries.dtype == torch.int32
    assert layout.samples.tolist() == [sample for sample, length in enumerate(lengths) for _ in range(length)]
    if len(set(lengths)) == 1:
        assert layout.padded_mask is None
    else:
        assert torch.equal(layout.padded_mask, mask[:, : max(lengths)])


def test_packing_passes_gradients_on_and_none_to_padding():
    padded, mask = make_batch((4, 1, 6), 2)
    padded.requires_grad_()
    states, layout = pack(padded, mask)
    weight = torch.randn(3, 6, 2)
    (gradient,) = torch.autograd.grad((layout.pad(states) * weight).sum(), padded)
    assert torch.equal(gradient, weight * mask[..., None])


@pytest.mark.parametrize("masked", [False, True])
def test_samples_of_one_length_are_plain_views(masked):
    padded = torch.randn(4, 5, 3)
    states, layout = pack(padded, torch.ones(4, 5, dtype=torch.bool) if masked else None)
    if masked:
        assert torch.equal(states, padded.flatten(0, 1))
    else:
        assert shares_memory(states, padded)
    assert layout.lengths is None and layout.mask is None and layout.padded_mask is None
    assert shares_memory(layout.pad(states), states) and shares_memory(layout.unpad(padded), padded)
    partition = layout.groups(3)
    (group,) = partition.groups
    taken = group.take(states)
    assert partition.samples is None and group.mask is None
    assert torch.equal(taken, padded) and shares_memory(taken, states)
    assert shares_memory(partition.join([taken]), states)


def test_a_rectangle_keeps_its_padding():
    padded, mask = make_batch((4, 1, 6), 2)
    layout = Layout.rectangle(3, 6, padded.device, mask)
    states = padded.flatten(0, 1)
    assert layout.row_counts.tolist() == [6, 6, 6] and layout.num_tokens.tolist() == [4, 1, 6]
    assert layout.starts.tolist() == [0, 6, 12] and layout.boundaries.tolist() == [0, 6, 12, 18]
    assert torch.equal(layout.pad(states), padded) and torch.equal(layout.padded_mask, mask)
    (group,) = layout.groups(2).groups
    assert torch.equal(group.take(states), padded) and torch.equal(group.mask, mask)


@pytest.mark.parametrize("samples", [slice(0, None, 2), slice(1, None, 2), slice(2, 5), slice(3, 4)], ids=str)
@pytest.mark.parametrize("lengths", [(9, 3, 7, 16, 5, 4), (6, 2, 6, 9, 6, 9), (5,) * 6], ids=str)
def test_selected_samples_are_those_of_the_batch(lengths, samples):
    padded, mask = make_batch(lengths, 3)
    chosen = torch.tensor(lengths)[samples]

    states, layout = pack(padded, mask)
    mine, selected = layout.select(states, samples)
    assert torch.equal(mine, padded[samples][mask[samples]])
    assert selected.row_counts.tolist() == chosen.tolist()
    assert (selected.batch_size, selected.longest, selected.total) == (len(chosen), chosen.amax(), chosen.sum())
    assert (selected.padded_mask is None) == (chosen.amin() == chosen.amax())

    rectangle = Layout.rectangle(*mask.shape, mask.device, mask)
    mine, selected = rectangle.select(padded.flatten(0, 1), samples)
    assert torch.equal(mine, padded[samples].flatten(0, 1))
    assert torch.equal(selected.mask, mask[samples])
    assert selected.num_tokens.tolist() == chosen.tolist() and selected.longest == mask.shape[1]


# Groups


@pytest.mark.parametrize("share", [0, 1 / 8])
@pytest.mark.parametrize("padding", [0, 10, 2**16])
@pytest.mark.parametrize("lengths", SOME_LENGTHS, ids=str)
def test_groups_of_similar_length_hold_each_token_once(lengths, padding, share, monkeypatch):
    monkeypatch.setattr(packing, "GROUP_SHARE", share)
    monkeypatch.setattr(packing, "GROUP_PADDING", padding)
    width = 2
    padded, mask = make_batch(lengths, width)
    states, layout = pack(padded, mask)
    rows = torch.arange(layout.total)
    partition = layout.groups(width)

    held, members = [], []
    for group in partition.groups:
        number, longest = group.shape
        samples = torch.arange(len(lengths)) if group.samples is None else group.samples
        of_group = torch.tensor(lengths)[samples]
        taken = group.take(rows)
        assert taken.shape == (number, longest) and number == len(samples) and longest == of_group.amax()
        real = torch.ones_like(taken, dtype=torch.bool) if group.mask is None else group.mask
        assert torch.equal(real, torch.arange(longest) < of_group[:, None])
        assert torch.equal(
            layout.samples[taken], samples[:, None].expand(-1, longest)
        )  # padding is of the sample, too
        assert (~real).sum() <= max(share * number * longest, padding // width)
        held += taken[real].tolist()
        members += samples.tolist()
    assert sorted(held) == rows.tolist() and sorted(members) == list(range(len(lengths)))
    if padding == share == 0:
        assert len(partition.groups) == len(set(lengths))
    if padding == 2**16:
        assert len(partition.groups) == 1

    assert torch.equal(partition.join([group.take(states) for group in partition.groups]), states)
    names = [torch.arange(len(lengths)) if group.samples is None else group.samples for group in partition.groups]
    assert partition.join_samples([name * 10 for name in names]).tolist() == [10 * n for n in range(len(lengths))]


def test_groups_by_hand(monkeypatch):
    monkeypatch.setattr(packing, "GROUP_PADDING", 0)
    _, layout = pack(*make_batch((10, 3, 10, 9, 3, 1), 4))
    # 9 beside two of 10 is one row of padding in thirty; 3 would be seven more, and 1 beside two of 3 two in nine.
    assert [sorted(samples.tolist()) for samples in layout.groups(4).samples] == [[0, 2, 3], [1, 4], [5]]


@pytest.mark.parametrize("rectangle", [False, True])
def test_a_batch_is_taken_in_the_groups_of_another_layout(rectangle, monkeypatch):
    monkeypatch.setattr(packing, "GROUP_PADDING", 0)
    _, others = pack(*make_batch((10, 3, 10, 9, 3, 1), 4))
    padded, mask = make_batch((2, 8, 1, 8, 8, 3), 4)
    if rectangle:
        layout = Layout.rectangle(*mask.shape, mask.device, mask)
        states = padded.flatten(0, 1)
    else:
        states, layout = pack(padded, mask)
    theirs = others.groups(4)
    partition = layout.partition(theirs.samples)
    for group, other in zip(partition.groups, theirs.groups, strict=True):
        assert torch.equal(group.samples, other.samples)
        taken = group.take(states)
        longest = 8 if rectangle else int(mask[group.samples].sum(1).amax())
        real = mask[group.samples, :longest]
        assert taken.shape == (len(group.samples), longest, 4)
        assert torch.equal(taken[real], padded[group.samples][:, :longest][real])
        assert torch.equal(torch.ones_like(real) if group.mask is None else group.mask, real)
    assert torch.equal(partition.join([group.take(states) for group in partition.groups]), states)


# Models


def count_groups(monkeypatch):
    """The numbers of groups that batches are taken in from now on."""
    numbers = []
    groups = Layout.groups

    def counting(self, width):
        partition = groups(self, width)
        numbers.append(len(partition.groups))
        return partition

    monkeypatch.setattr(Layout, "groups", counting)
    return numbers


@pytest.mark.parametrize("temperature", [1.0, 10.0])
@pytest.mark.parametrize("modalities", [("vision", "text"), ("vision",), ("text",)], ids="+".join)
@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_no_output_depends_on_the_groups(task, modalities, temperature, monkeypatch):
    model = make_task_model(task, {"pruning_modalities": modalities})
    model.set_pruning(temperature=temperature)
    inputs = TASKS[task].make_inputs(LENGTHS)
    numbers = count_groups(monkeypatch)
    results = []
    for padding in (0, 2**30):
        monkeypatch.setattr(packing, "GROUP_PADDING", padding)
        numbers.clear()
        output = model(**inputs)
        model.zero_grad()
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output, gradients))
        assert (max(numbers) > 2) if padding == 0 else (max(numbers) == 1)
    (grouped, grouped_gradients), (whole, whole_gradients) = results
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(grouped[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert grouped_gradients.keys() == whole_gradients.keys()
    for name, value in whole_gradients.items():
        torch.testing.assert_close(
            grouped_gradients[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def rows_of_linear_maps(model):
    """For each linear map of the encoders, by name, the numbers of rows that it computes from now on."""
    rows = {}
    for branch in ("vision_model", "text_encoder"):
        for name, module in getattr(model, branch, nn.Module()).named_modules():
            if isinstance(module, nn.Linear):

                def count(module, inputs, name=f"{branch}.{name}"):
                    rows.setdefault(name, []).append(inputs[0].numel() // inputs[0].shape[-1])

                module.register_forward_pre_hook(count)
    return rows


def rows_expected(name, output):
    """How many tokens a linear map is to compute, where the outputs say how many there are."""
    vision, text = output.vision_tokens, output.text_tokens
    layer = int(re.search(r"layers?\.(\d+)\.", name).group(1))
    if name.startswith("vision_model."):
        return int(vision[layer + ("mlp" in name)].sum())
    if "crossattention" in name and ("key" in name or "value" in name):
        of_image = vision[-1]
        if ".self0." in name or ".self1." in name:
            of_image = of_image[int(".self1." in name)]
        return int(of_image.sum())
    # The text is pruned between its self-attention and what comes then.
    return int(text[layer if ".attention." in name else layer + 1].sum())


@pytest.mark.parametrize("modalities", [("vision", "text"), ("vision",), ("text",)], ids="+".join)
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_no_linear_map_of_the_encoders_computes_padding(task, modalities):
    layers = (
        {"text_config": {"num_hidden_layers": 7}} if task == "nlvr2" else {}
    )  # the last of seven has a merge layer
    model = make_task_model(task, {"pruning_modalities": modalities}, **layers)
    model.set_pruning(temperature=3.0)
    inputs = TASKS[task].make_inputs(LENGTHS)
    rows = rows_of_linear_maps(model)
    for options in ({}, {"use_itm_head": False}) if task == "retrieval" else ({},):
        rows.clear()
        output = model(**inputs, **options)
        if "vision" in modalities:  # there would be padding
            assert output.vision_tokens[-1].amin() < output.vision_tokens[-1].amax()
        linear_maps = {
            f"{branch}.{name}"
            for branch in ("vision_model", "text_encoder")
            for name, module in getattr(model, branch, nn.Module()).named_modules()
            if isinstance(module, nn.Linear)
        }
        if options:  # the text by itself
            linear_maps = {name for name in linear_maps if "crossattention" not in name}
        assert rows.keys() == linear_maps
        for name, numbers in rows.items():
            assert numbers == [rows_expected(name, output)], name
