"""The benchmarks' baselines: token merging and token fusing on the same weights."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from madtp_hf.calibration import measure

from .conftest import TASKS, make_inputs, make_task_model


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from baselines import (
    BaselineVisionModel,
    evit_schedule,
    find_schedule,
    fuse_inattentive_tokens,
    merge_similar_tokens,
    tome_schedule,
)


LENGTH = 37  # of the tests' images: 6 x 6 patches and the class token


def test_schedules():
    assert tome_schedule(37, 4, 5) == [37, 32, 27, 22, 17]
    assert tome_schedule(37, 4, 2.5) == [37, 35, 32, 30, 27]
    assert tome_schedule(37, 4, 100) == [37, 19, 10, 6, 4]  # half of the others at most, the class token never
    assert tome_schedule(37, 4, 0) == evit_schedule(37, 4, 1.0) == [37] * 5
    assert evit_schedule(37, 4, 0.5) == [37, 37, 20, 12, 8]
    assert evit_schedule(577, 12, 0.7)[3:5] == [577, 406]  # the 4th layer is the first to leave fewer
    lengths = evit_schedule(577, 12, 0.7)
    assert [layer for layer in range(1, 13) if lengths[layer] < lengths[layer - 1]] == [4, 7, 10]


@pytest.mark.parametrize("method, schedule", [("tome", tome_schedule(37, 4, 0)), ("evit", evit_schedule(37, 4, 1))])
@torch.no_grad()
def test_nothing_to_reduce_is_the_dense_model(method, schedule):
    model, inputs = make_task_model("vqa"), make_inputs()
    dense = model(**inputs)
    states = model.vision_model(inputs["pixel_values"]).states
    model.vision_model = BaselineVisionModel(model.vision_model, method, schedule)
    output = model.vision_model(inputs["pixel_values"])
    torch.testing.assert_close(output.states, states, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(**inputs).logits, dense.logits, atol=1e-5, rtol=0)
    assert output.num_tokens.tolist() == [[LENGTH] * 3] * 5


@pytest.mark.parametrize(
    "method, schedule", [("tome", tome_schedule(37, 4, 6.5)), ("evit", evit_schedule(37, 4, 0.6))]
)
@pytest.mark.parametrize("task", list(TASKS))
@torch.no_grad()
def test_token_counts_fall_as_asked(task, method, schedule):
    model, inputs = make_task_model(task), TASKS[task].make_inputs()
    vision = model.vision_model
    model.vision_model = BaselineVisionModel(vision, method, schedule)
    entering = []
    for layer in vision.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: entering.append(args[0].shape[1]))
    output = model(**inputs)
    assert entering == schedule[1:]
    assert (output.vision_tokens.flatten(1) == torch.tensor(schedule)[:, None]).all()
    assert output.image_embeds.shape[-2] == schedule[-1]
    assert torch.isfinite(output[TASKS[task].scores]).all()


@torch.no_grad()
def test_an_output_does_not_depend_on_its_batch():
    vision, inputs = make_task_model("vqa").vision_model, make_inputs()
    for method, schedule in (("tome", tome_schedule(37, 4, 6)), ("evit", evit_schedule(37, 4, 0.6))):
        baseline = BaselineVisionModel(vision, method, schedule)
        together = baseline(inputs["pixel_values"]).states.view(3, schedule[-1], -1)
        alone = baseline(inputs["pixel_values"][1:2]).states.view(1, schedule[-1], -1)
        torch.testing.assert_close(alone, together[1:2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", (8, 9))
def test_merging_by_hand(length):
    states, key = torch.randn(2, length, 6), torch.randn(2, 3, length, 4)
    sizes, r = torch.randint(1, 5, (2, length)).float(), 2
    merged, merged_sizes = merge_similar_tokens(states, key, sizes, r)
    assert merged.shape == (2, length - r, 6) and torch.equal(merged_sizes.sum(1), sizes.sum(1))
    for sample in range(2):
        metric = F.normalize(key[sample].mean(0), dim=-1)
        pairs = []  # of each even token but the first: how like its nearest odd one it is
        for even in range(2, length, 2):
            pairs.append(max((float(metric[even] @ metric[odd]), even, odd) for odd in range(1, length, 2)))
        members = {token: [token] for token in range(length)}
        for _, even, odd in sorted(pairs, reverse=True)[:r]:
            members[odd].append(members.pop(even)[0])
        order = sorted(members, key=lambda token: (token % 2, token))
        for row, token in enumerate(order):
            group = members[token]
            weights = sizes[sample, group] / sizes[sample, group].sum()
            torch.testing.assert_close(merged[sample, row], weights @ states[sample, group])
            assert merged_sizes[sample, row] == sizes[sample, group].sum()


@torch.no_grad()
def test_a_merged_token_draws_the_attention_of_all_that_it_stands_for():
    vision = make_task_model("vqa").vision_model
    baseline = BaselineVisionModel(vision, "tome", tome_schedule(37, 4, 6))
    states = torch.randn(2, 5, 32)
    states[:, 4] = states[:, 3]
    apart, _ = baseline._run_layer(vision.encoder.layers[0], states, None, 5)
    sizes = torch.tensor([[1.0, 1, 1, 2]] * 2)
    merged, _ = baseline._run_layer(vision.encoder.layers[0], states[:, :4], sizes, 4)
    torch.testing.assert_close(merged, apart[:, :4])


def test_fusing_by_hand():
    states = torch.arange(6.0).view(1, 6, 1)
    attention = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.05]])
    fused = fuse_inattentive_tokens(states, attention, 2)
    torch.testing.assert_close(fused.flatten(), torch.tensor([0, 2, 4, 0.1 * 1 + 0.05 * 3 + 0.05 * 5]))


@pytest.mark.parametrize("method", ("tome", "evit"))
@pytest.mark.parametrize("task", list(TASKS))
@torch.no_grad()
def test_equal_flops(task, method):
    """The search is right about what the model then does, and near what it was asked for."""
    # Images of many tokens, for whole numbers of them to come near to any reduction.
    model = make_task_model(task, vision_config={"image_size": 96})
    inputs = TASKS[task].make_inputs(image_size=96)
    lengths = None if task == "captioning" else inputs["attention_mask"].sum(1)
    answer = {"vqa": 4, "captioning": inputs["attention_mask"].sum(1)}.get(task, 0)
    vision, config = model.vision_model, model.config
    for target in (0.1, 0.3, 0.4):
        schedule, reached = find_schedule(method, config, task, target, lengths, answer)
        assert abs(reached - target) < 0.01
        model.vision_model = BaselineVisionModel(vision, method, schedule)
        measured = measure(model, inputs, model(**inputs)).mean().item()
        assert abs(measured - reached) < 1e-5
    # The alignment scores of a model that prunes are none of theirs.
    config.pruning_temperature = 1.0
    assert find_schedule(method, config, task, target, lengths, answer) == (schedule, reached)
    assert config.pruning_temperature == 1.0
    # Out of reach: as near as it can.
    schedule, reached = find_schedule(method, config, task, 0.99, lengths, answer)
    assert reached < 0.95 and schedule == (tome_schedule(145, 4, 72) if method == "tome" else evit_schedule(145, 4, 0))
