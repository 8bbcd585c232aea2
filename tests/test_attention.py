"""Attention as the configuration asks for it, and the decoder's keys and values of what it reads, computed once a
sample."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from madtp_hf.modeling import attention as attention_module
from madtp_hf.modeling.attention import attend
from madtp_hf.modeling.sequences import Sequences, unpad

from .conftest import TASKS, make_task_model


LENGTHS = (9, 3, 7, 16, 5)
MODALITIES = (("vision", "text"), ("vision",), ("text",))


def make_model(task, temperature=0.0, modalities=("vision", "text")):
    model = make_task_model(task, {"pruning_modalities": modalities})
    model.set_pruning(temperature=temperature)
    return model


def check_same_outputs(mine, theirs, atol=1e-5):
    assert mine.keys() == theirs.keys()
    compared = 0
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(mine[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared > 3


class FusedAttention(TorchFunctionMode):
    """Counts the calls of torch's fused attention by the width of their heads: 8 in the image branch, 16 in the
    text's."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            width = args[0].shape[-1]
            self.calls[width] = self.calls.get(width, 0) + 1
        return function(*args, **(kwargs or {}))


def fused_calls(model, inputs):
    """The outputs of a model, and how often it has called fused attention for them."""
    with FusedAttention() as fused:
        output = model(**inputs)
    return output, sum(fused.calls.values())


# Eager and fused


def attention_written_out(query, key, value, is_causal):
    """Of one sample: (L, H, d) to (M, H, d)."""
    logits = torch.einsum("lhd,mhd->hlm", query, key) / math.sqrt(query.shape[-1])
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[1:]).triu(1).bool(), -math.inf)
    return torch.einsum("hlm,mhd->lhd", logits.softmax(-1), value)


def random_sequences(lengths, kind, heads=3, width=5):
    """Random states (R, H, d) of some sequences, how they lie, and what the formulas make of them: each one's own."""
    samples = [torch.randn(length, heads, width) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=30.0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    if kind == "varlen":
        return *unpad(padded, mask), samples
    sequences = Sequences.padded(*mask.shape, "cpu", None if mask.all() else mask)
    return padded.flatten(0, 1), sequences, samples


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kinds", itertools.product(["varlen", "padded"], repeat=2), ids=" to ".join)
@pytest.mark.parametrize("lengths", [(4, 4, 4), (7, 2, 9, 3, 8)], ids=str)
def test_attention_is_the_formula_on_each_samples_real_tokens(lengths, kinds, implementation, path):
    query, sequences, queries = random_sequences(lengths, kinds[0])
    key, context, keys = random_sequences([length + 3 * (i % 2) for i, length in enumerate(lengths)], kinds[1])
    value = torch.randn_like(key)
    values = [rows[:length] for rows, length in zip(context.pad(value), context.lengths)]
    output = attend(None, implementation, query, key, value, sequences, context)
    assert output.shape == (sequences.num_rows, 15)
    for mine, *sample in zip(sequences.pad(output), queries, keys, values, strict=True):
        expected = attention_written_out(*(t.double() for t in sample), is_causal=False).flatten(1)
        torch.testing.assert_close(mine[: len(expected)], expected.float())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["varlen", "padded"])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (7, 2, 9, 3, 8)], ids=str)
def test_causal_attention_sees_what_is_before(lengths, kind, implementation, path):
    query, sequences, queries = random_sequences(lengths, kind)
    key, value = torch.randn_like(query), torch.randn_like(query)
    output = attend(None, implementation, query, key, value, sequences, is_causal=True)
    for index, (mine, own) in enumerate(zip(sequences.pad(output), queries, strict=True)):
        others = [sequences.pad(states)[index, : len(own)].double() for states in (key, value)]
        expected = attention_written_out(own.double(), *others, is_causal=True).flatten(1)
        torch.testing.assert_close(mine[: len(expected)], expected.float())


@pytest.mark.parametrize(
    "task, modalities, temperature",
    [
        *((task, ("vision", "text"), 0.0) for task in TASKS),
        *((task, modalities, 3.0) for task in TASKS if task != "captioning" for modalities in MODALITIES),
        ("captioning", ("text",), 3.0),  # pruned, all attention of its encoder collects statistics
    ],
)
@torch.no_grad()
def test_eager_attention_gives_the_outputs_of_fused_attention(task, modalities, temperature):
    model = make_model(task, temperature, modalities)
    inputs = TASKS[task].make_inputs(LENGTHS)
    outputs = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        outputs[name], calls = fused_calls(model, inputs)
        assert (calls > 0) == (name == "sdpa")
    check_same_outputs(outputs["eager"], outputs["sdpa"])


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_a_checkpoint_loads_with_the_attention_that_is_asked_for(task, tmp_path):
    model = make_model(task, 3.0, ("text",))
    inputs = TASKS[task].make_inputs(LENGTHS)
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
        config = loaded.config
        for part in (config, config.vision_config, config.text_config):
            assert part._attn_implementation == name
        output, calls = fused_calls(loaded, inputs)
        check_same_outputs(output, expected)
        assert (calls > 0) == (name == "sdpa")
        # And it can be told otherwise.
        loaded.set_attn_implementation({"eager": "sdpa", "sdpa": "eager"}[name])
        _, calls = fused_calls(loaded, inputs)
        assert (calls > 0) == (name == "eager")


@torch.no_grad()
def test_each_branch_may_have_its_own_attention():
    model = make_task_model("vqa", text_config={"num_attention_heads": 2})  # whose heads are of another width
    inputs = TASKS["vqa"].make_inputs(LENGTHS)
    expected, calls = model(**inputs), []
    for name in (
        None,
        {"vision_config": "eager", "text_config": "sdpa"},
        {"vision_config": "sdpa", "text_config": "eager"},
    ):
        if name is not None:
            model.set_attn_implementation(name)
        with FusedAttention() as fused:
            output = model(**inputs)
        check_same_outputs(output, expected)
        calls.append(fused.calls)
    # Four layers of images; three of questions and three of answers, each with self- and cross-attention.
    assert calls == [{8: 4, 16: 12}, {16: 12}, {8: 4}]  # sdpa where nobody asks


def test_eager_attention_has_the_gradients_of_fused_attention():
    model = make_model("nlvr2", 3.0)
    inputs = TASKS["nlvr2"].make_inputs(LENGTHS)
    gradients = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients["eager"].keys() == gradients["sdpa"].keys()
    for key, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradient, gradients["sdpa"][key], atol=1e-5, rtol=1e-4)


def test_an_attention_that_does_not_exist_is_refused(tmp_path):
    model = make_model("vqa")
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")
    assert model.config._attn_implementation == before
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nonsense"):
        type(model).from_pretrained(tmp_path, attn_implementation="nonsense")


# Flash attention


@pytest.fixture
def flash(monkeypatch):
    """In flash attention's place, one that computes sample after sample, and remembers how many queries and keys it
    has got."""
    calls = []

    def attention(
        module,
        query,
        key,
        value,
        attention_mask,
        *,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        **options,
    ):
        assert attention_mask is None and options["is_causal"] is False
        assert len(query) == len(key) == len(value) == 1 and key.shape == value.shape  # (1, H, rows, d)
        assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
        queries, keys = cu_seq_lens_q.diff().tolist(), cu_seq_lens_k.diff().tolist()
        assert cu_seq_lens_q[0] == cu_seq_lens_k[0] == 0
        assert max(queries) == max_length_q and max(keys) == max_length_k
        states = [
            F.scaled_dot_product_attention(*sample)
            for sample in zip(query.split(queries, 2), key.split(keys, 2), value.split(keys, 2), strict=True)
        ]
        calls.append((query.shape[2], key.shape[2]))
        return torch.cat(states, dim=2).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", attention)
    return calls


def varlen_attention(output, config, modalities):
    """The numbers of queries and keys of all attention that collects no statistics, sample after sample without
    padding."""
    on = config.pruning_temperature > 0
    vision, text = output.vision_tokens, output.text_tokens
    calls = []
    if not (on and "vision" in modalities):
        calls += [(int(tokens.sum()),) * 2 for tokens in vision[:-1]]
    if on and text is not None:  # with pruning off texts keep their padding, as transformers' do
        images = vision[-1] if vision.ndim == 3 else vision[-1:]
        for enters, leaves in itertools.pairwise(text):
            if "text" not in modalities or enters.max() < 4:  # of two tokens that can go none ever does
                calls.append((int(enters.sum()),) * 2)
            calls += [(int(leaves.sum()), int(tokens.sum())) for tokens in images]
    return calls


@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.parametrize("modalities", MODALITIES, ids="+".join)
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_flash_attention_gets_the_tokens_end_to_end(task, modalities, temperature, flash):
    model = make_model(task, temperature, modalities)
    inputs = TASKS[task].make_inputs(LENGTHS)
    expected = model(**inputs)
    assert not flash
    # `set_attn_implementation` wants the package and a GPU; this is what it sets.
    model.config._attn_implementation = "flash_attention_2"
    output = model(**inputs)
    check_same_outputs(output, expected)
    assert flash == varlen_attention(output, model.config, modalities)


@torch.no_grad()
def test_the_decoder_generates_beside_flash_attention(flash):
    model = make_model("vqa", 3.0)
    inputs = TASKS["vqa"].make_inputs(LENGTHS)
    inputs.pop("labels")
    expected = model.generate(**inputs, num_beams=2, max_new_tokens=5)
    model.config._attn_implementation = "flash_attention_2"
    assert torch.equal(model.generate(**inputs, num_beams=2, max_new_tokens=5), expected)
    assert flash


# The decoder's cross-attention


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, of which several are returned": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def generation_inputs(task):
    inputs = TASKS[task].make_inputs(LENGTHS)
    names = ("pixel_values",) if task == "captioning" else ("pixel_values", "input_ids", "attention_mask")
    return {name: inputs[name] for name in names}


def generate(model, inputs, **settings):
    torch.manual_seed(5)
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True, **settings}
    result = model.generate(**inputs, **settings)
    return result.sequences, result.scores


def check_same_generation(mine, theirs):
    assert torch.equal(mine[0], theirs[0])
    for scores, expected in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def an_empty_cache():
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.parametrize("task", ["vqa", "captioning", "captioning with a prompt"])
def test_generation_is_the_same_with_the_cache_filled_beforehand(task, temperature, settings):
    task, *prompt = task.split(" with a ")
    model, inputs = make_model(task, temperature), generation_inputs(task)
    if prompt:
        inputs["input_ids"] = torch.tensor([[2, 11, 12, 13, 3]] * len(LENGTHS))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    filled = generate(model, inputs, **settings)
    assert len(filled[0]) == len(LENGTHS) * settings.get("num_return_sequences", 1)
    check_same_generation(filled, generate(model, inputs, past_key_values=an_empty_cache(), **settings))
    check_same_generation(filled, generate(model, inputs, use_cache=False, **settings))


@pytest.mark.parametrize("by", ["argument", "the decoder's own"])
@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
def test_settings_of_generation_may_come_as_a_configuration(settings, by):
    model, inputs = make_model("vqa", 3.0), generation_inputs("vqa")
    expected = generate(model, inputs, **settings)
    ids = {"bos_token_id": 38, "eos_token_id": 3, "pad_token_id": 0}
    configuration = GenerationConfig(max_new_tokens=6, **ids, **settings)
    if by == "argument":
        result = generate(model, inputs, generation_config=configuration)
    else:
        model.text_decoder.generation_config = configuration
        result = generate(model, inputs)
    check_same_generation(result, expected)


@pytest.mark.parametrize("task", ["vqa", "captioning"])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_configuration_may_turn_the_cache_off(task, temperature):
    model, inputs = make_model(task, temperature), generation_inputs(task)
    expected = generate(model, inputs)
    ids = {"bos_token_id": 38, "eos_token_id": 3, "pad_token_id": 0}
    configuration = GenerationConfig(max_new_tokens=6, use_cache=False, **ids)
    check_same_generation(generate(model, inputs, generation_config=configuration), expected)
    model.text_decoder.generation_config.use_cache = False
    check_same_generation(generate(model, inputs), expected)


@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_a_kind_of_cache_may_be_asked_for(task):
    model, inputs = make_model(task, 3.0), generation_inputs(task)
    expected = generate(model, inputs)
    check_same_generation(generate(model, inputs, cache_implementation="dynamic"), expected)


@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_an_answer_may_be_looked_up_or_drafted(task, temperature):
    model = make_model(task, temperature)
    inputs = {name: value[:1] for name, value in generation_inputs(task).items()}
    expected, _ = generate(model, inputs, max_new_tokens=10)
    for settings in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model.text_decoder}):
        assert torch.equal(generate(model, inputs, max_new_tokens=10, **settings)[0], expected)


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_keys_and_values_of_what_is_read_are_computed_once_and_on_no_padding(task, temperature, settings):
    model, inputs = make_model(task, temperature), generation_inputs(task)
    rows = {}
    for index, layer in enumerate(model.text_decoder.bert.encoder.layer):
        attention = layer.crossattention.self
        for name in ("query", "key", "value"):

            def count(module, inputs, place=(index, name)):
                rows.setdefault(place, []).append(inputs[0].numel() // inputs[0].shape[-1])

            getattr(attention, name).register_forward_pre_hook(count)
    with torch.no_grad():
        ids = torch.tensor([[38, 7, 3]] * len(LENGTHS))
        output = model(**{"input_ids": ids, **inputs}, **({"labels": ids} if task == "vqa" else {}))
    tokens = (output.text_tokens if task == "vqa" else output.vision_tokens)[-1]
    # With pruning off a question's padding is read, as transformers' BLIP reads it.
    read = len(LENGTHS) * max(LENGTHS) if task == "vqa" and not temperature else int(tokens.sum())
    assert temperature == 0 or tokens.amin() < tokens.amax()
    for _ in range(2):  # the next call has other images, for all it knows
        rows.clear()
        _, scores = generate(model, inputs, **settings)
        copies = max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1))
        for index in range(model.config.text_config.num_hidden_layers):
            assert rows[index, "key"] == rows[index, "value"] == [read]
            assert rows[index, "query"] == [len(LENGTHS) * copies] * len(scores)


# torch's varlen attention


@pytest.fixture
def varlen(monkeypatch):
    """In the place of torch's varlen attention, one of the same arguments in plain torch; remembers its calls."""
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen attention")
    calls = []

    def attention(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), num_splits=None, scale=None
    ):
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert query.ndim == 3 and key.shape == value.shape and query.shape[1:] == key.shape[1:]  # (rows, H, d)
        assert query.stride(2) == key.stride(2) == value.stride(2) == 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q[0] == cu_seq_k[0] == 0
        queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
        assert (sum(queries), sum(keys)) == (len(query), len(key))
        assert (type(max_q), type(max_k)) == (int, int) and (max(queries), max(keys)) == (max_q, max_k)
        assert num_splits == 1 and scale is None  # a sample does not depend on its batch
        calls.append((queries, keys, window_size))
        samples = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
        outputs = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sample), is_causal=window_size == (-1, 0))
            for sample in samples
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attention)
    monkeypatch.setattr(attention_module, "has_varlen_attn", lambda device: True)
    attention_module.varlen_parameters.cache_clear()
    yield calls
    attention_module.varlen_parameters.cache_clear()


@pytest.mark.parametrize("is_causal, is_cross", [(False, False), (True, False), (False, True)])
def test_attention_through_torchs_varlen_attention(is_causal, is_cross, varlen, monkeypatch):
    lengths, others = list(LENGTHS), [6] * len(LENGTHS) if is_cross else list(LENGTHS)
    sequences, context = Sequences.varlen(lengths, "cpu"), Sequences.varlen(others, "cpu")
    query_key_value = torch.randn(sum(lengths), 3, 2, 8).bfloat16()
    query, key, value = query_key_value.unbind(1)
    if is_cross:
        key, value = torch.randn(2, sum(others), 2, 8).bfloat16()
    arguments = (None, "sdpa", query, key, value, sequences, context)
    found = attend(*arguments, is_causal=is_causal)
    assert varlen == [(lengths, others, (-1, 0 if is_causal else -1))]
    monkeypatch.setattr(attention_module, "has_varlen_attn", lambda device: False)
    torch.testing.assert_close(found, attend(*arguments, is_causal=is_causal), atol=0.02, rtol=0)
    assert len(varlen) == 1


@torch.no_grad()
def test_what_torchs_varlen_attention_does_not_get(varlen):
    """float32, dropout, narrow heads, padding, and batches of one length, which fused attention takes as they are."""
    query, sequences = torch.randn(40, 2, 8), Sequences.varlen(list(LENGTHS), "cpu")
    padded = Sequences.padded(2, 20, "cpu", torch.arange(20) < torch.tensor([[20], [9]]))
    for states, layout, dropout in (
        (query, sequences, 0.0),
        (query.bfloat16(), sequences, 0.1),
        (query[..., :4].bfloat16(), sequences, 0.0),
        (query.bfloat16(), padded, 0.0),
        (query.bfloat16(), Sequences.varlen([20, 20], "cpu"), 0.0),
    ):
        attend(None, "sdpa", states, states, states, layout, dropout=dropout)
    assert not varlen


@torch.no_grad()
def test_a_model_through_torchs_varlen_attention(varlen, monkeypatch):
    """The text's cross-attention to images of different lengths."""
    model = make_model("vqa", 3.0, ("vision",)).bfloat16()
    inputs = TASKS["vqa"].make_inputs(LENGTHS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    output = model(**inputs)
    assert len(varlen) == 2 * model.config.text_config.num_hidden_layers
    assert {tuple(keys) for _, keys, _ in varlen} == {LENGTHS, tuple(output.vision_tokens[-1].tolist())}
    monkeypatch.setattr(attention_module, "has_varlen_attn", lambda device: False)
    assert (output.logits - model(**inputs).logits).abs().max() < 0.1


def test_on_a_cpu_torchs_varlen_attention_is_left_alone():
    assert not attention_module.has_varlen_attn(torch.device("cpu"))
