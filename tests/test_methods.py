"""The benchmarks' other methods, through the models' hook for them, against plain references that take one sample."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from madtp_hf.budgets.passes import measure

from .conftest import TASKS, close, make_inputs, make_task_model


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from methods import (
    FIXED,
    VARIANTS,
    evit_schedule,
    find_schedule,
    make_method,
    random_schedule,
    tome_schedule,
)


LENGTH = 37  # of the tests' images: 6 x 6 patches and the class token
SCHEDULES = {
    "tome": tome_schedule(37, 4, 6.5),
    "evit": evit_schedule(37, 4, 0.6),
    "random": random_schedule(37, 4, 0.7),
}
every_task = pytest.mark.parametrize("task", list(TASKS))
every_fixed = pytest.mark.parametrize("method", list(FIXED))
every_variant = pytest.mark.parametrize("method", list(VARIANTS))


def reduced_model(task, method, schedule=None, **overrides):
    model = make_task_model(task, **overrides)
    model.set_pruning_method(make_method(method, SCHEDULES[method] if schedule is None else schedule))
    return model


def test_schedules():
    assert tome_schedule(37, 4, 5) == [37, 32, 27, 22, 17]
    assert tome_schedule(37, 4, 2.5) == [37, 35, 32, 30, 27]
    assert tome_schedule(37, 4, 100) == [37, 19, 10, 6, 4]  # half of the others at most, the class token never
    assert tome_schedule(37, 4, 0) == evit_schedule(37, 4, 1.0) == random_schedule(37, 4, 1.0) == [37] * 5
    assert evit_schedule(37, 4, 0.5) == [37, 37, 20, 12, 8]
    assert random_schedule(37, 4, 0.5) == [37, 20, 12, 8, 6]
    lengths = evit_schedule(577, 12, 0.7)
    assert lengths[4] == 406  # 404 of 576, the class token, and one for the others
    assert [layer for layer in range(1, 13) if lengths[layer] < lengths[layer - 1]] == [4, 7, 10]


@every_fixed
@torch.no_grad()
def test_nothing_to_reduce_is_the_dense_model(method):
    model, inputs = make_task_model("vqa"), make_inputs()
    dense = model(**inputs)
    model.set_pruning_method(make_method(method, [LENGTH] * 5))
    output = model(**inputs)
    close(output.logits, dense.logits)
    close(output.image_embeds, dense.image_embeds)
    assert output.vision_tokens.tolist() == [[LENGTH] * 3] * 5


@every_fixed
@every_task
@torch.no_grad()
def test_token_counts_fall_as_asked(task, method):
    model, inputs = reduced_model(task, method), TASKS[task].make_inputs()
    schedule, entering = SCHEDULES[method], []
    num_images = inputs["pixel_values"].flatten(0, -4).shape[0]
    for layer in model.vision_model.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: entering.append(args[0].shape[0] / num_images))
    output = model(**inputs)
    assert entering == schedule[1:]
    assert (output.vision_tokens.flatten(1) == torch.tensor(schedule)[:, None]).all()
    assert output.image_embeds.shape[-2] == schedule[-1]
    assert torch.isfinite(output[TASKS[task].scores]).all()


@every_task
@torch.no_grad()
def test_the_text_stays_as_with_pruning_off(task):
    """Text and decoder compute what transformers' do: whatever they are given of an image, padding is treated
    alike."""
    model, inputs = reduced_model(task, "evit"), TASKS[task].make_inputs()
    reduced = model(**inputs)
    if task != "captioning":
        assert (reduced.text_tokens == inputs["attention_mask"].sum(1)).all()
    # The dense model on the images' reduced states.
    vision_model = model.vision_model
    states = vision_model(
        inputs["pixel_values"].flatten(0, -4), make_method("evit", SCHEDULES["evit"])(model, "vision", False)
    )
    model.set_pruning_method(None)
    model.vision_model = GivenStates(states)
    close(model(**inputs)[TASKS[task].scores], reduced[TASKS[task].scores])


class GivenStates(torch.nn.Module):
    def __init__(self, states):
        super().__init__()
        self.states = states

    def forward(self, pixel_values, *args, **kwargs):
        return self.states


@pytest.mark.parametrize("method", ("tome", "evit"))
@torch.no_grad()
def test_an_output_does_not_depend_on_its_batch(method):
    model, inputs = reduced_model("vqa", method), make_inputs()
    together = model(**inputs).image_embeds
    alone = model(**{name: value[1:2] for name, value in inputs.items()}).image_embeds
    close(alone, together[1:2], atol=1e-4)


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


@pytest.mark.parametrize("rate", (6.5, 2.5))  # the class token's partners run out of even tokens, and don't
@torch.no_grad()
def test_tome_equals_its_reference(rate):
    schedule = tome_schedule(37, 4, rate)
    model, inputs = reduced_model("vqa", "tome", schedule), make_inputs()
    states = model(**inputs).image_embeds
    for sample in range(3):
        expected = run_tome(model.vision_model, inputs["pixel_values"][sample], schedule)
        close(states[sample, 0], expected[0], atol=1e-4)
        close(sorted_rows(states[sample]), sorted_rows(expected), atol=1e-4)  # the reference moves rows


@torch.no_grad()
def test_tome_goes_on_where_a_layer_merges_nothing():
    schedule = [37, 30, 30, 25, 25]
    model, inputs = reduced_model("vqa", "tome", schedule), make_inputs()
    expected = run_tome(model.vision_model, inputs["pixel_values"][0], schedule)
    close(sorted_rows(model(**inputs).image_embeds[0]), sorted_rows(expected), atol=1e-4)


@torch.no_grad()
def test_evit_equals_its_reference():
    model, inputs = reduced_model("vqa", "evit"), make_inputs()
    states = model(**inputs).image_embeds
    for sample in range(3):
        close(
            states[sample],
            run_evit(model.vision_model, inputs["pixel_values"][sample], SCHEDULES["evit"]),
            atol=1e-4,
        )


@torch.no_grad()
def test_random_tokens():
    inputs = make_inputs()
    schedule = [37, 20, 20, 20, 20]
    model = reduced_model("vqa", "random", schedule)
    first, second = (model(**inputs, output_positions=True) for _ in range(2))
    positions = first.vision_positions[1]
    assert positions[:, 0].eq(0).all() and positions[:, -1].eq(-1).all()  # the class token, and the merged one
    assert (positions[:, 1:-1].diff(dim=1) > 0).all()
    assert not torch.equal(positions[0], positions[1])  # each image has its own
    assert not torch.equal(positions, second.vision_positions[1])  # and in the next pass others
    model.set_pruning_method(make_method("random", schedule))
    assert torch.equal(model(**inputs, output_positions=True).image_embeds, first.image_embeds)
    model.set_pruning_method(make_method("random", schedule, seed=1))
    assert not torch.equal(model(**inputs).image_embeds, first.image_embeds)


@torch.no_grad()
def test_random_tokens_that_go_become_their_mean():
    model, inputs = reduced_model("vqa", "random", [37, 20, 20, 20, 20]), make_inputs()
    layer, taken = model.vision_model.encoder.layers[0], []
    layer.layer_norm2.register_forward_pre_hook(lambda module, args: taken.append(args[0].view(3, 20, -1)))
    positions = model(**inputs, output_positions=True).vision_positions[1]
    for sample in range(3):
        states = model.vision_model.embeddings(inputs["pixel_values"][sample : sample + 1])[0]
        states, _, _ = attention_of_one(layer, states)
        gone = sorted(set(range(37)) - set(positions[sample].tolist()))
        close(taken[0][sample, -1], states[gone].mean(0))


# Variants of MADTP


@torch.no_grad()
def test_class_attention_keeps_what_the_class_token_attends_to():
    """MADTP's formulas with s = s_cls, for one image in the first layer."""
    model, inputs = make_task_model("vqa"), make_inputs()
    model.set_pruning_method(make_method("class_attention"))
    temperature = 3.0
    model.set_pruning(temperature=temperature)
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
@every_variant
@torch.no_grad()
def test_variants_reduce_both_branches_otherwise_than_madtp(task, method):
    model, inputs = make_task_model(task), TASKS[task].make_inputs(lengths=(16, 12, 9))
    model.set_pruning(temperature=3.0)
    madtp = model(**inputs)
    model.set_pruning_method(make_method(method))
    variant = model(**inputs)
    assert (variant.vision_tokens[-1] < LENGTH).any()
    if task != "captioning":
        assert (variant.text_tokens[-1] < variant.text_tokens[0]).any()
    assert not torch.equal(variant[TASKS[task].scores], madtp[TASKS[task].scores])
    assert torch.isfinite(variant[TASKS[task].scores]).all()
    model.set_pruning(None)
    off = model(**inputs)
    model.set_pruning_method(None)
    assert torch.equal(off[TASKS[task].scores], model(**inputs)[TASKS[task].scores])


# The hook


@pytest.mark.parametrize("method", (*FIXED, *VARIANTS))
def test_without_the_method_the_model_is_madtp_again(method):
    model, inputs = make_task_model("vqa"), make_inputs()
    model.set_pruning(temperature=3.0)
    with torch.no_grad():
        before = model(**inputs)
        model.set_pruning_method(make_method(method, SCHEDULES.get(method)))
        assert not torch.equal(model(**inputs).logits, before.logits)
        model.set_pruning_method(None)
        after = model(**inputs)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.vision_tokens, before.vision_tokens)


@pytest.mark.parametrize("method", (*FIXED, *VARIANTS))
def test_gradients_flow_and_are_those_of_checkpointed_layers(method):
    def gradients(checkpointing):
        model, inputs = make_task_model("vqa").train(), make_inputs()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if method in VARIANTS:
            model.set_pruning(temperature=3.0)
        model.set_pruning_method(make_method(method, SCHEDULES.get(method)))
        model(**inputs).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    found, recomputed = gradients(False), gradients(True)
    for name, gradient in found.items():  # each parameter has one, as distributed training needs
        assert torch.isfinite(gradient).all()
        close(recomputed[name], gradient)
    assert found["vision_model.embeddings.patch_embedding.weight"].abs().sum() > 0


@every_fixed
@every_task
@torch.no_grad()
def test_equal_flops(task, method):
    """The search is right about what the model then does, and near what it was asked for."""
    # Images of many tokens, for whole numbers of them to come near to any reduction.
    model = make_task_model(task, vision_config={"image_size": 96})
    inputs = TASKS[task].make_inputs(image_size=96)
    lengths = None if task == "captioning" else inputs["attention_mask"].sum(1)
    answer = {"vqa": 4, "captioning": inputs["attention_mask"].sum(1)}.get(task, 0)
    config = model.config
    for target in (0.1, 0.3, 0.4):
        schedule, reached = find_schedule(method, config, task, target, lengths, answer)
        assert abs(reached - target) < 0.01
        model.set_pruning_method(make_method(method, schedule))
        measured = measure(model, inputs, model(**inputs)).mean().item()
        assert abs(measured - reached) < 1e-5
    # The alignment scores of a model that prunes are none of theirs.
    config.pruning_temperature = 1.0
    assert find_schedule(method, config, task, target, lengths, answer) == (schedule, reached)
    assert config.pruning_temperature == 1.0
    # Out of reach: as near as it can.
    schedule, reached = find_schedule(method, config, task, 0.99, lengths, answer)
    fewest = {
        "tome": tome_schedule(145, 4, 72),
        "evit": evit_schedule(145, 4, 0),
        "random": random_schedule(145, 4, 0),
    }
    assert reached < 0.95 and schedule == fewest[method]


def test_bad_input():
    model, inputs = make_task_model("vqa"), make_inputs()
    with pytest.raises(ValueError, match=r"Method 'nothing': expected one of tome, .*without_alignment"):
        make_method("nothing")
    with pytest.raises(ValueError, match="expected one of tome, evit, random"):
        find_schedule("class_attention", model.config, "vqa", 0.5)
    for name, schedule in (("tome", None), ("class_attention", [37])):
        with pytest.raises(ValueError, match="expected a schedule for tome"):
            make_method(name, schedule)
    with pytest.raises(TypeError, match="set_pruning_method got 'tome': expected a function"):
        model.set_pruning_method("tome")
    model.set_pruning_method(make_method("tome", [145, 100, 100, 100, 100]))
    with pytest.raises(ValueError, match="Layer 0 gets sequences of up to 37 tokens: the schedule expects 145"):
        model(**inputs)


@torch.no_grad()
def test_the_method_of_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].split("...\n")[0]
    model, inputs = make_task_model("vqa"), make_inputs()
    exec(code, {"model": model})
    assert model(**inputs).vision_tokens[:, 0].tolist() == [37, 20, 11, 7, 7]
