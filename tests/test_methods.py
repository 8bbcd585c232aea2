"""Every pruning method: against plain references for one sample, calibrated, trained, frozen, saved and loaded."""

import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from madtp_hf import ReductionCallback, calibrate
from madtp_hf.budgets.calibration import measure_reduction
from madtp_hf.budgets.flops import count_flops
from madtp_hf.budgets.passes import measure
from madtp_hf.modeling.pruning_method import METHODS, PruningMethod

from .conftest import TASKS, close, make_inputs, make_task_model, one_sample, padded_otherwise
from .helpers.pages import blocks_of
from .test_checkpoint import run


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from methods import ABLATIONS, MERGE_ABLATIONS


LENGTH = 37  # of the tests' images: 6 x 6 patches and the class token
SETTINGS = {
    "madtp": {"temperature": 3.0},
    "madtp_merge": {"temperature": 3.0},
    "class_attention": {"temperature": 3.0},
    "tome": {"r": 6.5},
    "evit": {"keep_rate": 0.6},
    "random": {"keep_rate": 0.7},
    **{name: {"temperature": 3.0} for name in ABLATIONS},
}
COUNTS = {"tome": [37, 31, 24, 18, 11], "evit": [37, 37, 24, 16, 11], "random": [37, 28, 21, 16, 13]}
OURS = ("madtp", "madtp_merge", "class_attention", "evit", "tome", "random")
every_task = pytest.mark.parametrize("task", list(TASKS))
every_fixed = pytest.mark.parametrize("method", list(COUNTS))
every_method = pytest.mark.parametrize("method", OURS)
# Every method on one task, and every task with one method; the other combinations are slow.
every_combination = pytest.mark.parametrize(
    ("task", "method"),
    [
        (task, method) if task == "vqa" or method == "madtp" else pytest.param(task, method, marks=pytest.mark.slow)
        for task in TASKS
        for method in OURS
    ],
)


def pruned_model(task, method, setting=None, **overrides):
    model = make_task_model(task, **overrides)
    model.set_pruning_method(method)
    model.set_pruning(**(setting or SETTINGS[method]))
    return model


def counts_of(method, setting, task="vqa"):
    with torch.no_grad():
        output = pruned_model(task, method, setting)(**TASKS[task].make_inputs())
    return output.vision_tokens[:, 0].tolist()


def test_token_counts():
    assert counts_of("tome", {"r": 5}) == [37, 32, 27, 22, 17]
    assert counts_of("tome", {"r": 2.5}) == [37, 35, 32, 30, 27]
    assert counts_of("tome", {"r": 100}) == [37, 19, 10, 6, 4]  # half of the others at most, the class token never
    assert counts_of("evit", {"keep_rate": 0.5}) == [37, 37, 20, 12, 8]
    assert counts_of("random", {"keep_rate": 0.5}) == [37, 20, 12, 8, 6]


@every_fixed
@every_task
@torch.no_grad()
def test_token_counts_fall_as_asked(task, method):
    model, inputs, entering = pruned_model(task, method), TASKS[task].make_inputs(), []
    num_images = inputs["pixel_values"].flatten(0, -4).shape[0]
    for layer in model.vision_model.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: entering.append(args[0].shape[0] / num_images))
    output = model(**inputs)
    assert entering == COUNTS[method][1:]
    assert (output.vision_tokens.flatten(1) == torch.tensor(COUNTS[method])[:, None]).all()
    assert output.image_embeds.shape[-2] == COUNTS[method][-1]
    assert torch.isfinite(output[TASKS[task].scores]).all()
    if task != "captioning":  # texts lose nothing
        assert (output.text_tokens == inputs["attention_mask"].sum(1)).all()


@every_method
@every_task
@torch.no_grad()
def test_off_is_the_dense_model(task, method):
    model, inputs = make_task_model(task), TASKS[task].make_inputs()
    dense = model(**inputs)
    model.set_pruning_method(method)
    name = next(iter(METHODS[method].fields))
    for setting in ({name: METHODS[method].off}, {name: None}, {"reduction": 0.0}):
        model.set_pruning(**SETTINGS[method])
        assert model.is_pruning
        model.set_pruning(**setting)
        assert not model.is_pruning and model.config.pruning_setting is None
    assert torch.equal(model(**inputs)[TASKS[task].scores], dense[TASKS[task].scores])


@pytest.mark.parametrize("method", ("madtp_merge", "class_attention", "tome", "evit"))
@every_task
@torch.no_grad()
def test_an_output_depends_neither_on_its_batch_nor_on_padding(task, method):
    model, inputs = pruned_model(task, method), TASKS[task].make_inputs()
    scores = TASKS[task].scores
    together, lengths = model(**inputs)[scores], [None] * 3
    if task == "captioning":  # scores of every token: those of padding say nothing
        lengths = inputs["attention_mask"].sum(1).tolist()
    for other in padded_otherwise(inputs, task):
        for mine, theirs, length in zip(model(**other)[scores], together, lengths):
            close(mine[:length], theirs[:length], atol=1e-4)
    for index, length in enumerate(lengths):
        alone = one_sample(inputs, index, TASKS[task].sequences)
        close(model(**alone)[scores][0], together[index, :length], atol=1e-4)


# References: one image at a time, one token at a time.


def attention_of_one(layer, states, sizes=None):
    """states (L, D) -> the states behind self-attention, keys (H, L, d) and maps (H, L, L)."""
    heads = layer.self_attn.num_heads
    qkv = layer.self_attn.qkv(layer.layer_norm1(states)).view(len(states), 3, heads, -1)
    query, key, value = qkv.permute(1, 2, 0, 3)
    logits = query @ key.transpose(1, 2) / key.shape[-1] ** 0.5
    if sizes is not None:
        logits = logits + torch.tensor(sizes).log()
    maps = logits.softmax(-1)
    output = (maps @ value).transpose(0, 1).flatten(1)
    return states + layer.self_attn.projection(output), key, maps


def tome_of_one(states, key, groups, number):
    """A list of groups of patches, the first the class token's: the `number` of the even ones most like an odd one
    join it."""
    metric = F.normalize(key.mean(0), dim=-1)
    pairs = []
    for even in range(2, len(groups), 2):
        pairs.append(max((float(metric[even] @ metric[odd]), even, odd) for odd in range(1, len(groups), 2)))
    members = {token: [token] for token in range(len(groups))}
    for _, even, odd in sorted(pairs, reverse=True)[:number]:
        members[odd].append(members.pop(even)[0])
    order = sorted(members, key=lambda token: (token % 2, token))
    merged, merged_groups = [], []
    for token in order:
        sizes = torch.tensor([float(len(groups[member])) for member in members[token]])
        merged.append((states[members[token]] * sizes[:, None]).sum(0) / sizes.sum())
        merged_groups.append([patch for member in members[token] for patch in groups[member]])
    return torch.stack(merged), merged_groups


def run_tome(vision_model, pixel_values, schedule):
    states = vision_model.embeddings(pixel_values[None])[0]
    groups = [[patch] for patch in range(len(states))]
    for layer, left in zip(vision_model.encoder.layers, schedule[1:]):
        states, key, _ = attention_of_one(layer, states, [float(len(group)) for group in groups])
        if left < len(states):
            states, groups = tome_of_one(states, key, groups, len(states) - left)
        states = states + layer.mlp(layer.layer_norm2(states))
    return vision_model.post_layernorm(states)


def run_evit(vision_model, pixel_values, schedule):
    states = vision_model.embeddings(pixel_values[None])[0]
    for layer, left in zip(vision_model.encoder.layers, schedule[1:]):
        states, _, maps = attention_of_one(layer, states)
        if left < len(states):
            by_class = maps[:, 0, 1:].mean(0)
            ranked = sorted(range(len(by_class)), key=lambda n: -by_class[n])
            kept, rest = sorted(ranked[: left - 2]), ranked[left - 2 :]
            fused = sum(by_class[n] * states[1 + n] for n in rest)
            states = torch.stack([states[0], *(states[1 + n] for n in kept), fused])
        states = states + layer.mlp(layer.layer_norm2(states))
    return vision_model.post_layernorm(states)


def sorted_rows(states):
    return states[states[:, 0].argsort()]


@pytest.mark.parametrize("r", (6.5, 2.5))  # the class token's partners run out of even tokens, and don't
@torch.no_grad()
def test_tome_equals_its_reference(r):
    model, inputs = pruned_model("vqa", "tome", {"r": r}), make_inputs()
    output = model(**inputs)
    for sample in range(3):
        expected = run_tome(model.vision_model, inputs["pixel_values"][sample], output.vision_tokens[:, 0].tolist())
        states = output.image_embeds[sample]
        close(states[0], expected[0], atol=1e-4)
        close(sorted_rows(states), sorted_rows(expected), atol=1e-4)  # the reference moves rows


@torch.no_grad()
def test_tome_goes_on_where_a_layer_merges_nothing():
    model, inputs = pruned_model("vqa", "tome", {"r": 0.6}), make_inputs()
    assert model(**inputs).vision_tokens[:, 0].tolist() == [37, 37, 36, 36, 35]
    expected = run_tome(model.vision_model, inputs["pixel_values"][0], [37, 37, 36, 36, 35])
    close(sorted_rows(model(**inputs).image_embeds[0]), sorted_rows(expected), atol=1e-4)


@torch.no_grad()
def test_evit_equals_its_reference():
    model, inputs = pruned_model("vqa", "evit"), make_inputs()
    states = model(**inputs).image_embeds
    for sample in range(3):
        expected = run_evit(model.vision_model, inputs["pixel_values"][sample], COUNTS["evit"])
        close(states[sample], expected, atol=1e-4)


@torch.no_grad()
def test_random_tokens():
    model, inputs = pruned_model("vqa", "random", {"keep_rate": 0.5}), make_inputs()
    first, second = (model(**inputs, output_positions=True) for _ in range(2))
    positions = first.vision_positions[1]
    assert positions[:, 0].eq(0).all() and positions[:, -1].eq(-1).all()  # the class token, and the merged one
    assert (positions[:, 1:-1].diff(dim=1) > 0).all()
    assert not torch.equal(positions[0], positions[1])  # each image has its own
    assert torch.equal(first.image_embeds, second.image_embeds)
    model.set_pruning(keep_rate=0.5, seed=1)
    assert not torch.equal(model(**inputs).image_embeds, first.image_embeds)


@torch.no_grad()
def test_random_tokens_that_go_become_their_mean():
    model, inputs = pruned_model("vqa", "random", {"keep_rate": 0.5}), make_inputs()
    layer, taken = model.vision_model.encoder.layers[0], []
    layer.layer_norm2.register_forward_pre_hook(lambda module, args: taken.append(args[0].view(3, 20, -1)))
    positions = model(**inputs, output_positions=True).vision_positions[1]
    for sample in range(3):
        states = model.vision_model.embeddings(inputs["pixel_values"][sample : sample + 1])[0]
        states, _, _ = attention_of_one(layer, states)
        gone = sorted(set(range(37)) - set(positions[sample].tolist()))
        close(taken[0][sample, -1], states[gone].mean(0))


@torch.no_grad()
def test_class_attention_keeps_what_the_class_token_attends_to():
    """MADTP's formulas with s = s_cls, for one image in the first layer."""
    temperature = 3.0
    model, inputs = pruned_model("vqa", "class_attention"), make_inputs()
    positions = model(**inputs, output_positions=True).vision_positions[1]
    layer, alignment = model.vision_model.encoder.layers[0], model.alignment.tokens
    reduced = 0
    for sample in range(3):
        states = model.vision_model.embeddings(inputs["pixel_values"][sample : sample + 1])[0]
        _, _, maps = attention_of_one(layer, states)
        value = layer.self_attn.qkv(layer.layer_norm1(states)).view(37, 3, 4, -1)[:, 2].transpose(0, 1)
        norm = (maps @ value).norm(dim=-1)[:, 1:]
        importance = (maps[:, 0, 1:] * norm / norm.sum(0)).sum(0)
        gate = (states[1:] @ alignment.T / temperature).softmax(0)
        stays = importance > (gate * importance[:, None]).sum(0).min()
        found = {n - 1 for n in positions[sample].tolist() if n > 0}
        assert found == set(stays.nonzero().flatten().tolist())
        reduced += len(found) < 35
    assert reduced == 3


@every_task
@pytest.mark.parametrize("method", ("class_attention", "madtp_merge", *ABLATIONS, *MERGE_ABLATIONS))
@torch.no_grad()
def test_variants_prune_both_branches_otherwise_than_madtp(task, method):
    model, inputs = pruned_model(task, "madtp"), TASKS[task].make_inputs(lengths=(16, 12, 9))
    madtp = model(**inputs)
    model.set_pruning_method(method)
    model.set_pruning(temperature=3.0)
    variant = model(**inputs)
    assert (variant.vision_tokens[-1] < LENGTH).any()
    if task != "captioning":
        assert (variant.text_tokens[-1] < variant.text_tokens[0]).any()
    assert not torch.equal(variant[TASKS[task].scores], madtp[TASKS[task].scores])
    assert torch.isfinite(variant[TASKS[task].scores]).all()


@pytest.mark.parametrize("reentrant", [False, True])
@every_method
def test_gradients_flow_and_are_those_of_checkpointed_layers(method, reentrant):
    def gradients(checkpointing):
        model, inputs = pruned_model("vqa", method).train(), make_inputs()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    found, recomputed = gradients(False), gradients(True)
    for name, gradient in found.items():  # each parameter has one, as distributed training needs
        assert torch.isfinite(gradient).all()
        close(recomputed[name], gradient)
    assert found["vision_model.embeddings.patch_embedding.weight"].abs().sum() > 0


@pytest.mark.parametrize("method", ("evit", "tome", "madtp_merge"))
@torch.no_grad()
def test_attention_maps_are_returned(method):
    model, inputs = pruned_model("vqa", method), make_inputs()
    expected = model(**inputs)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True)
    assert [maps.shape[-1] for maps in output.attentions] == expected.vision_tokens[:-1].amax(dim=1).tolist()
    close(output.logits, expected.logits, atol=1e-4)


# What the package does with a method


def calibrated(task, method, reductions, pruning_layers=None, **options):
    # Enough of a vision encoder for half of the FLOPs to be its own, and enough tokens to come near any reduction.
    model = make_task_model(task, text_config={"num_hidden_layers": 2}, vision_config={"image_size": 96})
    model.set_pruning_method(method)
    model.config.pruning_layers = pruning_layers
    batches = [TASKS[task].make_inputs((9, 5, 7, 12), seed=seed, image_size=96) for seed in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The schedule rests on")
        calibrate(model, batches, reductions, **options)
    return model, batches


@every_combination
@torch.no_grad()
def test_each_method_is_calibrated_for_each_task(task, method):
    model, batches = calibrated(task, method, [0.2, 0.4])
    assert model.config.calibrated_reductions == [0.2, 0.4]
    for entry in model.config.pruning_schedule:
        assert set(entry) >= {"reduction", next(iter(METHODS[method].fields))}
        setting = {name: value for name, value in entry.items() if name != "reduction"}
        reached = measure_reduction(model, batches, **setting)
        assert reached == pytest.approx(entry["reduction"], abs=0.01)
        model.set_pruning(reduction=entry["reduction"])
        found = [measure(model, batch, model(**batch)) for batch in batches]
        assert torch.cat(found).mean().item() == pytest.approx(reached, abs=1e-5)
    model.set_pruning(reduction=0.3)  # in between
    found = torch.cat([measure(model, batch, model(**batch)) for batch in batches]).mean().item()
    assert 0.2 < found < 0.4


@every_task
@torch.no_grad()
def test_the_first_layers_alone_prune(task, tmp_path):
    model, batches = calibrated(task, "madtp", [0.2, 0.4], pruning_layers=1)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path).eval()
    assert model.config.pruning_layers == 1
    for reduction in (0.2, 0.4):
        model.set_pruning(reduction=reduction)
        outputs = [model(**batch) for batch in batches]
        found = torch.cat([measure(model, batch, output) for batch, output in zip(batches, outputs)])
        assert found.mean().item() == pytest.approx(reduction, abs=0.01)
        for counts in (outputs[0].vision_tokens, outputs[0].text_tokens):
            assert counts is None or (counts[1:] == counts[1]).all()
        assert (outputs[0].vision_tokens[1] < outputs[0].vision_tokens[0]).any()


def test_pruning_most_in_one_layer_takes_a_factor_above_1():
    config = make_task_model("vqa", pruning_layers=1).config
    path = METHODS["madtp"].path(config)
    config.pruning_layers = None
    every_layer = METHODS["madtp"].path(config)
    assert path.setting(path.points[-1])["factor"] == pytest.approx(1.25)
    assert every_layer.setting(every_layer.points[-1])["factor"] == 1
    for point in path.points:
        assert path.point(path.setting(point)) == pytest.approx(point)


@every_method
def test_what_a_method_adds_is_counted(method):
    model = make_task_model("vqa")
    config, width = model.config, 32
    vision, text = torch.full((5, 1), LENGTH), torch.full((4, 1), 9)
    off = count_flops(config, "vqa", vision, text)
    model.set_pruning_method(method)
    assert torch.equal(count_flops(config, "vqa", vision, text), off)
    model.set_pruning(**SETTINGS[method])
    scores = (4 * LENGTH + 3 * 9) * 12 * width
    added = {
        "madtp": scores,
        "madtp_merge": scores + (4 * LENGTH**2 + 3 * 9**2) * 8,
        "class_attention": scores,
        "evit": 3 * LENGTH * width,
        "tome": 4 * (LENGTH / 2) ** 2 * 8,
        "random": 0,
    }
    assert count_flops(config, "vqa", vision, text).item() - off.item() == pytest.approx(added[method], abs=200)
    config.pruning_layers, config.pruning_setting = 1, SETTINGS[method]  # other layers switch pruning off
    of_first = dict.fromkeys(("madtp", "class_attention"), (LENGTH + 9) * 12 * width)
    of_first["madtp_merge"] = of_first["madtp"] + (LENGTH**2 + 9**2) * 8
    in_first = count_flops(config, "vqa", vision, text).item() - off.item()
    assert in_first == pytest.approx(of_first.get(method, added[method]), abs=200)
    config.pruning_layers, config.pruning_setting = None, SETTINGS[method]
    config.pruning_modalities = ("text",)
    of_text = 3 * 9 * 12 * width if method in of_first else 0
    of_text += 3 * 9**2 * 8 if method == "madtp_merge" else 0
    assert count_flops(config, "vqa", vision, text).item() - off.item() == pytest.approx(of_text, abs=200)


@pytest.mark.parametrize(
    "method", [name if name in ("madtp", "evit") else pytest.param(name, marks=pytest.mark.slow) for name in OURS]
)
@torch.no_grad()
def test_each_method_is_frozen_and_exported(method):
    model, _ = calibrated("vqa", method, [0.3], freeze=True)
    assert model.config.pruning_granularity == "frozen" and not model.is_pruning
    model.set_pruning(reduction=0.3)

    def inputs(lengths, seed):
        batch = make_inputs(lengths, seed, image_size=96)
        start = batch.pop("labels")[:, :1]
        return {**batch, "decoder_input_ids": start}

    batch, example = torch.export.Dim("batch", min=2, max=64), inputs((9, 5, 7), 0)
    shapes = {name: {0: batch} for name in example}
    program = torch.export.export(model, (), kwargs=example, dynamic_shapes=shapes, strict=False)
    other = inputs((9, 4, 6, 9, 5), 7)
    close(program.module()(**other).logits, model(**other).logits, atol=1e-4)


class Rows(torch.utils.data.Dataset):
    def __init__(self, task):
        self.columns = TASKS[task].make_inputs((8,) * 16, image_size=96)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.columns.items()}


@every_combination
def test_each_method_trains_at_a_target(task, method, tmp_path):
    model, _ = calibrated(task, method, [0.3])
    callback = ReductionCallback(0.3)
    options = {"remove_unused_columns": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=4, logging_steps=1, save_strategy="no", **options
    )

    def collate(rows):
        return {**torch.utils.data.default_collate(rows), **TASKS[task].to_train}

    trainer = Trainer(model, arguments, train_dataset=Rows(task), data_collator=collate, callbacks=[callback])
    trainer.train()
    reached = [entry["reduction"] for entry in trainer.state.log_history if "reduction" in entry]
    assert len(reached) == 10 and abs(sum(reached[5:]) / 5 - 0.3) < 0.06
    name = f"pruning_{next(iter(METHODS[method].fields))}"
    assert all(name in entry for entry in trainer.state.log_history if "reduction" in entry)
    assert model.is_pruning


LOAD = """
inputs = torch.load(sys.argv[3], weights_only=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    loaded = model(**inputs).logits.tolist()
again = sys.argv[4] + "/again"
model.save_pretrained(again)
model = AutoModel.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    saved_again = model(**inputs).logits.tolist()
print("RESULT" + json.dumps([model.config.pruning_method, loaded, saved_again]))
"""


def load_elsewhere(model, tmp_path):
    """A saved model's method and logits, in a process without the package; saved and loaded there once more."""
    inputs = make_inputs()
    torch.save(inputs, tmp_path / "inputs.pt")
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model(**inputs).logits
    arguments = (tmp_path / "saved", "vqa", tmp_path / "inputs.pt", tmp_path)
    name, *found = run(LOAD, *arguments, cache=tmp_path / "modules")
    for logits in found:
        close(torch.tensor(logits), expected)
    return name


@pytest.mark.parametrize(
    "method", ("madtp_merge", *(pytest.param(other, marks=pytest.mark.slow) for other in ("class_attention", "tome")))
)
def test_a_saved_method_loads_without_the_package(method, tmp_path):
    assert load_elsewhere(pruned_model("vqa", method), tmp_path) == method


LOAD_ALL = """
inputs = torch.load(sys.argv[3], weights_only=True)
found = {}
for method in sys.argv[5].split():
    model = AutoModel.from_pretrained(folder + "/" + method, trust_remote_code=True)
    with torch.no_grad():
        output = model(**inputs)
    found[method] = [model.config.pruning_method, output[sys.argv[4]].tolist(), output.vision_tokens.tolist()]
print("RESULT" + json.dumps(found))
"""


@pytest.mark.slow  # 20 models
@every_task
@torch.no_grad()
def test_each_calibrated_method_loads_without_the_package(task, tmp_path):
    """Calibrated to 0.5 and saved at it, a checkpoint gives the same outputs elsewhere, with pruning as it was set."""
    expected, name = {}, TASKS[task].scores
    for method in OURS:
        model, batches = calibrated(task, method, [0.5])
        (reached,) = model.config.calibrated_reductions
        assert reached == pytest.approx(0.5, abs=0.005), method
        model.set_pruning(reduction=reached)
        model.save_pretrained(tmp_path / "saved" / method)
        expected[method] = model(**batches[0])
        assert (expected[method].vision_tokens[-1] < expected[method].vision_tokens[0]).any()
    torch.save(batches[0], tmp_path / "inputs.pt")
    arguments = (tmp_path / "saved", task, tmp_path / "inputs.pt", name, " ".join(OURS))
    for method, (loaded, scores, tokens) in run(LOAD_ALL, *arguments, cache=tmp_path / "modules").items():
        assert loaded == method
        close(torch.tensor(scores), expected[method][name])
        assert tokens == expected[method].vision_tokens.tolist()


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, for methods that only a test defines."""
    monkeypatch.setattr("madtp_hf.modeling.pruning_method.METHODS", dict(METHODS))


PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def test_the_method_of_the_documentation_is_carried_by_its_checkpoint(tmp_path, monkeypatch):
    """Beside `half.py`, the last block runs on this test's model."""
    *_, definition, block = [block for block in blocks_of(PAGE) if block.language == "python"]
    (tmp_path / definition.file).write_text(definition.code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    batches = [make_inputs(lengths=(9, 5, 7, 12), seed=seed) for seed in range(2)]
    model = make_task_model("vqa", text_config={"num_hidden_layers": 2})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The schedule rests on")
            namespace = {"model": model, "batches": batches, "calibrate": calibrate, "__name__": "page"}
            exec(block.code, namespace)
        assert model.config.pruning_method == "half" and model.is_pruning
        with torch.no_grad():
            output = model(**batches[0])
        assert (output.vision_tokens[-1] < LENGTH).all() and (output.text_tokens[-1] < output.text_tokens[0]).any()
        assert load_elsewhere(model, tmp_path) == "half"
    finally:
        METHODS.pop("half", None)


def test_a_method_that_cannot_be_carried_is_named(model, tmp_path, registry):
    namespace = {"PruningMethod": PruningMethod, "__name__": "__main__"}
    exec("class Typed(PruningMethod):\n    name = 'typed'", namespace)
    METHODS["typed"] = namespace["Typed"]
    try:
        model.set_pruning_method(namespace["Typed"])
        with pytest.raises(ValueError, match="'typed' is defined in __main__, so a checkpoint can't carry it: move"):
            model.save_pretrained(tmp_path)
    finally:
        del METHODS["typed"]


def test_bad_input(model):
    with pytest.raises(ValueError, match=r"pruning_method='nothing': expected one of class_attention, evit, madtp"):
        model.set_pruning_method("nothing")
    for given in (None, 3, PruningMethod, object):
        with pytest.raises(TypeError, match=r"set_pruning_method got .*: expected the name of a pruning method"):
            model.set_pruning_method(given)
    model.set_pruning_method("tome")
    with pytest.raises(ValueError, match=r"temperature=1.0: the pruning method 'tome' expects r"):
        model.set_pruning(temperature=1.0)
    for r in (-1.0, float("nan"), "8", True):
        with pytest.raises(ValueError, match=r"r=.*: expected a finite number"):
            model.set_pruning(r=r)
    model.set_pruning_method("evit")
    with pytest.raises(ValueError, match=r"keep_rate=1.5: expected .* at least 0 and at most 1; keep_rate=1 is off"):
        model.set_pruning(keep_rate=1.5)
    assert not model.is_pruning
    with pytest.raises(ValueError, match="needs a calibrated schedule"):
        model.set_pruning(reduction=0.5)
    with pytest.raises(ValueError, match="pruning_method='nothing'"):
        type(model).from_blip(model, pruning_method="nothing")


def test_other_layers_switch_pruning_off_and_drop_the_schedule(model, caplog):
    model.config.pruning_schedule = [{"reduction": 0.5, "temperature": 2.0, "factor": 1.0}]
    model.set_pruning(reduction=0.5)
    model.config.pruning_layers = None  # as it is
    assert model.is_pruning
    assert not caplog.records
    model.config.pruning_layers = 2
    assert not model.is_pruning and model.config.pruning_schedule is None
    assert "dropped, because it was calibrated with pruning_layers=None" in caplog.text
    assert "madtp_hf.calibrate(" in caplog.text
    with pytest.raises(ValueError, match="pruning_layers=0: expected a whole number of at least 1"):
        model.config.pruning_layers = 0


def test_another_method_switches_pruning_off_and_drops_the_schedule(model, caplog):
    model.config.pruning_schedule = [{"reduction": 0.5, "temperature": 3.0}]
    model.set_pruning(reduction=0.5)
    model.set_pruning_method("madtp")
    assert model.is_pruning and not caplog.records
    model.set_pruning_method("evit")
    assert not model.is_pruning and model.config.pruning_schedule is None
    assert "dropped, because it was calibrated with pruning_method='madtp'" in caplog.text
    model.set_pruning_method("tome")  # nothing to drop
    assert len(caplog.records) == 1


# A setting for one thread


@torch.no_grad()
def test_a_block_prunes_and_leaves_the_model_as_it_was(model):
    inputs = make_inputs()
    model.set_pruning(temperature=3.0)
    pruned = model(**inputs)
    before = dict(model.config.pruning_setting)
    with model.pruning(None):
        assert not model.is_pruning
        off = model(**inputs)
        with model.pruning(method="evit", keep_rate=0.6):
            assert model(**inputs).vision_tokens[:, 0].tolist() == COUNTS["evit"]
        assert torch.equal(model(**inputs).logits, off.logits)
    assert (off.vision_tokens == LENGTH).all()
    assert model.config.pruning_setting == before and torch.equal(model(**inputs).logits, pruned.logits)
    with pytest.raises(RuntimeError, match="inside"), model.pruning(None):
        raise RuntimeError("inside")
    assert model.is_pruning
    with pytest.raises(ValueError, match="expected one of them"), model.pruning(reduction=0.5, temperature=1.0):
        pass


@torch.no_grad()
def test_threads_do_not_see_one_another():
    model, (inputs, _) = calibrated("vqa", "madtp", [0.1, 0.2, 0.3, 0.4])
    reductions = (0.0, 0.1, 0.2, 0.3, 0.4)
    model.set_pruning(reduction=0.4)
    expected = {}
    for reduction in reductions:
        with model.pruning(reduction=reduction):
            expected[reduction] = model(**inputs).logits, model.generate(inputs["input_ids"], inputs["pixel_values"])
    wrong, barrier = [], threading.Barrier(8)

    @torch.no_grad()
    def work(number):
        barrier.wait()
        for place in range(10):
            reduction = reductions[(number + place) % 5]
            with model.pruning(reduction=reduction):
                logits = model(**inputs).logits
                answers = model.generate(inputs["input_ids"], inputs["pixel_values"])
            if not (torch.equal(logits, expected[reduction][0]) and torch.equal(answers, expected[reduction][1])):
                wrong.append((number, reduction))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(model(**inputs).logits, expected[0.4][0])  # the global setting is as it was
