"""How a batch's sequences lie in memory, and that no output depends on how a batch is divided, nor a linear map sees
padding."""

import itertools
import re

import pytest
import torch
from torch import nn

from madtp_hf.modeling import chunks as chunks_module
from madtp_hf.modeling.chunks import Chunking, divide, whole
from madtp_hf.modeling.sequences import Sequences, count_tokens, scatter_rows, unpad

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


def set_chunks(monkeypatch, size=2**60, padding=2**60, share=0.0, area=2**60):
    """How large chunks of a batch may be, and how much padding they may hold: any of either, if not said."""
    settings = {"CHUNK_SIZE": size, "CHUNK_PADDING": padding, "CHUNK_PADDING_SHARE": share, "CHUNK_AREA": area}
    for name, value in settings.items():
        monkeypatch.setattr(chunks_module, name, value)


# Rows and padded states


@pytest.mark.parametrize("width", [(), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("lengths", SOME_LENGTHS, ids=str)
def test_varlen_rows_are_the_real_tokens_one_sequence_after_the_other(lengths, width):
    padded, mask = make_batch(lengths, *width, longest=max(lengths) + 3)
    states, sequences = unpad(padded, mask)
    assert torch.equal(states, padded[mask])

    zeroed = padded[:, : max(lengths)].clone()
    zeroed[~mask[:, : max(lengths)]] = 0
    assert torch.equal(sequences.pad_zeros(states), zeroed)
    filled = sequences.pad(states)
    assert torch.equal(filled[mask[:, : max(lengths)]], states)
    for row, length in zip(filled, lengths):  # padding holds copies of the last real row
        assert torch.equal(row[length:], row[length - 1].expand_as(row[length:]))
    assert torch.equal(sequences.unpad(filled), states)
    assert torch.equal(sequences.unpad(padded[:, : max(lengths)]), states)  # whatever is in the padding

    assert sequences.is_varlen == (len(set(lengths)) > 1)
    assert (sequences.batch_size, sequences.max_seqlen, sequences.num_rows) == (
        len(lengths),
        max(lengths),
        sum(lengths),
    )
    assert sequences.row_counts == sequences.lengths.tolist() == list(lengths)
    starts = [0, *itertools.accumulate(lengths)]
    assert sequences.cu_seqlens.tolist() == starts and sequences.cu_seqlens.dtype == torch.int32
    assert sequences.positions.tolist() == [place for length in lengths for place in range(length)]
    if width == (6,):
        assert torch.equal(sequences.first(states), padded[:, 0])
    if len(set(lengths)) == 1:
        assert sequences.mask is None and sequences.float_mask is None
    else:
        assert torch.equal(sequences.mask, mask[:, : max(lengths)])
        assert torch.equal(sequences.float_mask, sequences.mask.float())


def test_unpadding_passes_gradients_on_and_none_to_padding():
    padded, mask = make_batch((4, 1, 6), 2)
    padded.requires_grad_()
    states, sequences = unpad(padded, mask)
    weight = torch.randn(3, 6, 2)
    (gradient,) = torch.autograd.grad((sequences.pad_zeros(states) * weight).sum(), padded)
    assert torch.equal(gradient, weight * mask[..., None])
    # Copies at padding give theirs to the row that they are of.
    (gradient,) = torch.autograd.grad((sequences.pad(unpad(padded, mask)[0]) * weight).sum(), padded)
    expected = weight * mask[..., None]
    for row, length in enumerate((4, 1, 6)):
        expected[row, length - 1] += weight[row, length:].sum(0)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_sequences_of_one_length_are_plain_views(masked):
    padded = torch.randn(4, 5, 3)
    states, sequences = unpad(padded, torch.ones(4, 5, dtype=torch.bool) if masked else None)
    assert torch.equal(states, padded.flatten(0, 1)) and shares_memory(states, padded)
    assert not sequences.is_varlen and sequences.mask is None
    for make in (sequences.pad, sequences.pad_zeros):
        assert torch.equal(make(states), padded) and shares_memory(make(states), states)
    assert shares_memory(sequences.unpad(padded), padded)
    assert whole(sequences).chunks(sequences) == [sequences]


def test_padded_sequences_keep_their_padding():
    padded, mask = make_batch((4, 1, 6), 2)
    sequences = Sequences.padded(3, 6, padded.device, mask)
    states = padded.flatten(0, 1)
    assert not sequences.is_varlen and sequences.num_rows == 18
    assert sequences.row_counts == [6, 6, 6] and sequences.lengths.tolist() == [4, 1, 6]
    assert sequences.cu_seqlens.tolist() == [0, 6, 12, 18]
    assert sequences.positions.tolist() == [0, 1, 2, 3, 4, 5] * 3
    assert torch.equal(sequences.pad(states), padded) and torch.equal(sequences.pad_zeros(states), padded)
    assert torch.equal(sequences.unpad(padded), states)
    assert torch.equal(sequences.first(states), padded[:, 0]) and torch.equal(sequences.mask, mask)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("lengths", [(9, 3, 7, 16, 5, 4), (6, 2, 6, 9, 6, 9), (5,) * 6], ids=str)
def test_every_other_sequence(lengths, first):
    padded, mask = make_batch(lengths, 3)
    chosen = list(lengths[first::2])

    states, sequences = unpad(padded, mask)
    mine, selected = sequences.every_other(states, first)
    assert torch.equal(mine, padded[first::2][mask[first::2]])
    assert selected.row_counts == selected.lengths.tolist() == chosen
    assert (selected.batch_size, selected.max_seqlen, selected.num_rows) == (3, max(chosen), sum(chosen))
    assert (selected.mask is None) == (len(set(chosen)) == 1)

    mine, selected = Sequences.padded(*mask.shape, mask.device, mask).every_other(padded.flatten(0, 1), first)
    assert torch.equal(mine, padded[first::2].flatten(0, 1))
    assert torch.equal(selected.mask, mask[first::2])
    assert selected.lengths.tolist() == chosen and selected.max_seqlen == mask.shape[1]


def test_rows_are_scattered_by_their_numbers():
    states = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    scattered = scatter_rows(states, torch.tensor([3, 0, 1, 0]), 4, fill=-1)
    assert scattered.tolist() == [[3, 30], [-1, -1], [1, 10], [-1, -1]]
    states.requires_grad_()
    (scatter_rows(states, torch.tensor([2, 0, 1, 0]), 2) * torch.tensor([[2.0], [3.0]])).sum().backward()
    assert states.grad[:, 0].tolist() == [3, 0, 2, 0]


def test_tokens_are_counted_in_layers_of_any_kind():
    mask = make_batch((4, 1, 6))[1]
    padded, masked = Sequences.padded(3, 6, "cpu"), Sequences.padded(3, 6, "cpu", mask)
    varlen = Sequences.varlen([3, 1, 2], "cpu")
    for layers, expected in (
        ([padded, padded], [[6] * 3] * 2),
        ([padded, varlen], [[6] * 3, [3, 1, 2]]),
        ([masked, masked], [[4, 1, 6]] * 2),
        ([masked, varlen], [[4, 1, 6], [3, 1, 2]]),
    ):
        counts = count_tokens(layers)
        assert counts.tolist() == expected and counts.dtype == torch.int64


def test_a_layout_moves_to_another_device():
    """Of a model whose layers lie on several devices."""
    mask = make_batch((4, 1, 6))[1]
    for sequences in (
        Sequences.padded(3, 6, "cpu"),
        Sequences.padded(3, 6, "cpu", mask),
        Sequences.varlen([4, 1, 6], "cpu"),
    ):
        assert sequences.to("cpu") is sequences
        assert sequences.mask is None or sequences.mask.device.type == "cpu"
        moved = sequences.to("meta")
        assert (moved.row_counts, moved.num_rows) == (sequences.row_counts, sequences.num_rows)
        assert (moved.mask is None) == (sequences.mask is None)
        for name in ("lengths", "cu_seqlens", "positions", "mask", "float_mask"):
            value = getattr(moved, name)
            assert value is None or value.device.type == "meta", name


# Parts of a batch


def layout_of(lengths, kind, width=2):
    """Random states of sequences of these lengths, as rows, how they lie, and padded with their mask."""
    padded, mask = make_batch(lengths, width)
    if kind == "varlen":
        return *unpad(padded, mask), padded, mask
    return padded.flatten(0, 1), Sequences.padded(*mask.shape, mask.device, mask), padded, mask


@pytest.mark.parametrize("kind", ["varlen", "padded"])
@pytest.mark.parametrize(
    "size, padding, share", [(2**60, 0, 0), (2**60, 10, 0), (2**60, 0, 1 / 8), (60, 2**60, 0), (1, 0, 0)]
)
@pytest.mark.parametrize("lengths", SOME_LENGTHS, ids=str)
def test_chunks_hold_each_row_once_and_no_more_padding_than_allowed(lengths, size, padding, share, kind, monkeypatch):
    set_chunks(monkeypatch, size, padding, share)
    width = 2
    states, sequences, padded, mask = layout_of(lengths, kind, width)
    chunking = divide(sequences, width)
    order, bounds = list(chunking.order or range(len(lengths))), chunking.bounds
    assert sorted(order) == list(range(len(lengths)))
    assert bounds[0] == 0 and bounds[-1] == len(lengths) and list(bounds) == sorted(set(bounds))
    chunks = chunking.chunks(sequences)
    for chunk, (start, stop) in zip(chunks, itertools.pairwise(bounds), strict=True):
        samples = order[start:stop]
        of_part = [lengths[sample] for sample in samples]
        assert chunk.batch_size == stop - start and chunk.lengths.tolist() == of_part
        assert chunk.max_seqlen == (max(of_part) if kind == "varlen" else max(lengths))
        real = mask[samples, : chunk.max_seqlen]
        assert torch.equal(torch.ones_like(real) if chunk.mask is None else chunk.mask, real)
        assert torch.equal(chunk.pad(states)[real], padded[samples][:, : chunk.max_seqlen][real])
        slots = chunk.batch_size * chunk.max_seqlen
        assert chunk.batch_size == 1 or slots * width <= size
        if kind == "varlen":
            assert slots - chunk.num_rows <= max(share * slots, padding / width)
    assert torch.equal(chunking.join_rows([chunk.unpad(chunk.pad(states)) for chunk in chunks], sequences), states)
    assert chunking.join_samples([chunk.lengths for chunk in chunks]).tolist() == list(lengths)
    if size == 1:
        assert len(chunks) == len(lengths)


def test_chunks_by_hand(monkeypatch):
    _, sequences, *_ = layout_of((10, 9, 10, 3, 3, 1, 10), "varlen")
    set_chunks(monkeypatch, padding=0, share=1 / 8)
    # 9 beside three of 10 is one row of padding in forty; 3 would be seven more, and 1 beside two of 3 two in nine.
    assert divide(sequences, 4) == Chunking((0, 4, 6, 7), (0, 2, 6, 1, 3, 4, 5))
    set_chunks(monkeypatch, size=80)  # two of ten rows of width 4
    assert divide(sequences, 4) == Chunking((0, 2, 4, 7), (0, 2, 6, 1, 3, 4, 5))
    set_chunks(monkeypatch)
    assert divide(sequences, 4) == whole(sequences) == Chunking((0, 7))


def test_padding_is_measured_by_the_area_of_maps_too(monkeypatch):
    _, sequences, *_ = layout_of((30, 10, 10), "varlen")
    set_chunks(monkeypatch)
    assert divide(sequences, 4) == whole(sequences)
    set_chunks(monkeypatch, area=30**2)  # two of 10 beside 30 are 1,600 numbers too many, one is 800
    assert divide(sequences, 4) == Chunking((0, 2, 3))
    set_chunks(monkeypatch, area=700)
    assert divide(sequences, 4) == Chunking((0, 1, 3))


@pytest.mark.parametrize("kind", ["varlen", "padded"])
def test_other_devices_take_a_batch_at_once(kind, device_path, monkeypatch):
    set_chunks(monkeypatch, size=1, padding=0)
    assert divide(layout_of(LENGTHS, kind)[1], 4) == Chunking((0, 8))


@pytest.mark.parametrize("kind", ["varlen", "padded"])
def test_a_batch_is_taken_in_the_chunks_of_another(kind, monkeypatch):
    """As a text is in those of the images that it looks at."""
    set_chunks(monkeypatch, padding=0)
    chunking = divide(layout_of((10, 10, 3, 9, 3, 1), "varlen")[1], 4)
    assert chunking == Chunking((0, 2, 3, 5, 6), (0, 1, 3, 2, 4, 5))
    states, sequences, padded, mask = layout_of((2, 8, 1, 8, 8, 3), kind)
    chunks = chunking.chunks(sequences)
    for chunk, (start, stop) in zip(chunks, itertools.pairwise(chunking.bounds), strict=True):
        samples, longest = list(chunking.order[start:stop]), chunk.max_seqlen
        real = mask[samples, :longest]
        assert longest == (8 if kind == "padded" else int(real.sum(1).amax()))
        assert torch.equal(chunk.pad(states)[real], padded[samples][:, :longest][real])
    assert torch.equal(chunking.join_rows([chunk.unpad(chunk.pad(states)) for chunk in chunks], sequences), states)


# Models


def outputs_and_gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 10.0])
@pytest.mark.parametrize(
    "task, modalities, granularity",
    [
        *(
            (task, modalities, "instance")
            for task in ("vqa", "nlvr2")
            for modalities in (("vision", "text"), ("vision",), ("text",))
        ),
        ("vqa", ("vision", "text"), "batch"),
        ("captioning", ("vision", "text"), "instance"),
        ("retrieval", ("vision", "text"), "instance"),
    ],
)
def test_no_output_depends_on_how_a_batch_is_divided(task, modalities, granularity, temperature, monkeypatch):
    model = make_task_model(task, {"pruning_modalities": modalities, "pruning_granularity": granularity})
    model.set_pruning(temperature=temperature)
    inputs = {**TASKS[task].make_inputs(LENGTHS), **TASKS[task].to_train}
    results = []
    with monkeypatch.context() as patch:
        patch.setattr(chunks_module, "CPU_TAKES_CHUNKS", False)
        torch.manual_seed(3)  # hard negatives are drawn
        at_once, at_once_gradients = outputs_and_gradients(model, inputs)
    counts = [
        tokens[-1].flatten().tolist() for tokens in (at_once.vision_tokens, at_once.text_tokens) if tokens is not None
    ]
    for settings in ({"size": 1}, {"padding": 0}, {"size": 2**9}, {}):
        set_chunks(monkeypatch, **settings)
        # There is something to divide.
        divided = [len(divide(Sequences.varlen(count, "cpu"), 32).bounds) > 2 for count in counts]
        assert any(divided) == bool(settings)
        torch.manual_seed(3)
        results.append(outputs_and_gradients(model, inputs))
    for output, gradients in results:
        assert output.keys() == at_once.keys()
        for name, value in at_once.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(output[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert gradients.keys() == at_once_gradients.keys()
        for name, value in at_once_gradients.items():
            torch.testing.assert_close(gradients[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


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
def test_no_linear_map_of_the_encoders_computes_padding(task, modalities, path):
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
