"""The published implementation's numbers."""

import pytest
import torch

from madtp_hf import MadtpBlipConfig, convert_original_checkpoint


def golden_model(reference, task):
    cases, _, folder = reference
    sizes = cases["config"]
    config = MadtpBlipConfig(
        text_config={
            "num_attention_heads": sizes["heads"],
            "layer_norm_eps": sizes["text_layer_norm_eps"],
            "bos_token_id": sizes["dec_token_id"],
        },
        vision_config={"num_attention_heads": sizes["heads"], "layer_norm_eps": sizes["vision_layer_norm_eps"]},
    )
    return convert_original_checkpoint(folder / f"{task}.weights.safetensors", task, config=config)


def assert_same_set(states, expected, atol=1e-4):
    """The class token first, the others in any order."""
    torch.testing.assert_close(states[:, 0], expected[:, 0], atol=atol, rtol=0)
    for mine, theirs in zip(states, expected):
        distance = torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(len(theirs)))
        torch.testing.assert_close(mine, theirs[nearest], atol=atol, rtol=0)


@pytest.mark.parametrize("granularity", ["instance", "batch"])
@pytest.mark.parametrize("case", range(4))
def test_question_answering(reference, granularity, case):
    cases, tensors, _ = reference
    if case == 3 and granularity == "instance":
        pytest.skip("case 3 holds three samples, recorded in batch granularity")
    model = golden_model(reference, "vqa")
    model.config.pruning_granularity = granularity
    inputs = {name: tensors[f"vqa.{case}.{name}"] for name in ("pixel_values", "input_ids", "labels")}
    for entry in cases["cases"]:
        task, number, temperature = entry["key"].split(".")
        if (task, number) != ("vqa", str(case)):
            continue
        model.set_pruning(temperature=float(temperature[3:]))
        with torch.no_grad():
            output = model(**inputs)
        expected = {
            name: tensors[f"{entry['key']}.{name}"] for name in ("answer_logits", "loss_alignment", "loss_task")
        }
        counts = entry["tokens_after_each_layer"]
        assert output.vision_tokens[1:].amax(1).tolist() == counts["vision"]
        assert output.text_tokens[1:].amax(1).tolist() == counts["text"]
        torch.testing.assert_close(output.logits, expected["answer_logits"], atol=1e-4, rtol=0)
        assert_same_set(output.image_embeds, tensors[f"{entry['key']}.image_embeds"])
        assert_same_set(output.question_states, tensors[f"{entry['key']}.question_states"])
        # Theirs is the sum over an answer's tokens, averaged over the batch; ours the mean over tokens, as transformers'.
        answer_length = inputs["labels"].shape[1] - 1
        torch.testing.assert_close(output.task_loss * answer_length, expected["loss_task"][0], atol=1e-4, rtol=0)
        if model.config.pruning_temperature > 0:
            torch.testing.assert_close(output.alignment_loss, expected["loss_alignment"][0], atol=1e-4, rtol=0)


def golden_cases(reference, task, case):
    """The entries of a case, one a temperature, and its inputs."""
    cases, tensors, _ = reference
    entries = [entry for entry in cases["cases"] if entry["key"].startswith(f"{task}.{case}.")]
    assert len(entries) == len(cases["temperatures"])
    inputs = {
        name: tensors[f"{task}.{case}.{name}"]
        for name in ("pixel_values", "input_ids", "labels")
        if f"{task}.{case}.{name}" in tensors
    }
    return entries, inputs


BOTH = pytest.mark.parametrize("granularity", ["instance", "batch"])
CASES = pytest.mark.parametrize("case", range(4))


def pruned_model(reference, task, case, granularity):
    if granularity == "instance" and (case == 3 or task == "nlvr2"):
        pytest.skip("several images at once: recorded in batch granularity")
    model = golden_model(reference, task)
    model.config.pruning_granularity = granularity
    return model


def assert_counts(counts, expected):
    assert counts[1:].flatten(1).amax(1).tolist() == expected


def assert_near(value, expected):
    torch.testing.assert_close(value, expected.view_as(value), atol=1e-4, rtol=0)


@CASES
def test_visual_reasoning(reference, case):
    model = pruned_model(reference, "nlvr2", case, "batch")
    entries, inputs = golden_cases(reference, "nlvr2", case)
    # All left images, then all right ones -> the pairs.
    inputs["pixel_values"] = torch.stack(inputs["pixel_values"].chunk(2), dim=1)
    for entry in entries:
        key = entry["key"]
        model.set_pruning(temperature=float(key.split(".tau")[1]))
        with torch.no_grad():
            output = model(**inputs)
        assert_counts(output.vision_tokens, entry["tokens_after_each_layer"]["vision"])
        assert_counts(output.text_tokens, entry["tokens_after_each_layer"]["text"])
        assert_near(output.logits, reference[1][f"{key}.logits"])
        assert_near(output.task_loss, reference[1][f"{key}.loss_task"])
        assert_same_set(output.image_embeds.transpose(0, 1).flatten(0, 1), reference[1][f"{key}.image_embeds"])
        if model.is_pruning:
            assert_near(output.alignment_loss, reference[1][f"{key}.loss_alignment"])


@BOTH
@CASES
def test_captioning(reference, granularity, case):
    model = pruned_model(reference, "captioning", case, granularity)
    entries, inputs = golden_cases(reference, "captioning", case)
    for entry in entries:
        key = entry["key"]
        model.set_pruning(temperature=float(key.split(".tau")[1]))
        with torch.no_grad():
            output = model(**inputs)
        assert_counts(output.vision_tokens, entry["tokens_after_each_layer"]["vision"])
        assert_near(output.logits, reference[1][f"{key}.logits"])
        assert_near(output.loss, reference[1][f"{key}.loss_task"])
        assert_same_set(output.image_embeds, reference[1][f"{key}.image_embeds"])


@BOTH
@CASES
def test_retrieval(reference, granularity, case):
    model = pruned_model(reference, "retrieval", case, granularity)
    entries, inputs = golden_cases(reference, "retrieval", case)
    for entry in entries:
        key = entry["key"]
        model.set_pruning(temperature=float(key.split(".tau")[1]))
        with torch.no_grad():
            apart = model(**inputs, use_itm_head=False)
            matching = model(**inputs)
            features = model.get_image_features(inputs["pixel_values"]), model.get_text_features(inputs["input_ids"])
        for output in (apart, matching):
            assert_counts(output.vision_tokens, entry["tokens_after_each_layer"]["vision"])
        assert_counts(apart.text_tokens, entry["tokens_after_each_layer"]["text"])
        assert_counts(matching.text_tokens, entry["tokens_after_each_layer_matching"])
        for modality, feature in zip(("image", "text"), features):
            assert_near(feature, reference[1][f"{key}.{modality}_feature"])
            assert_near(apart[f"{modality}_feature"], reference[1][f"{key}.{modality}_feature"])
        assert_near(matching.itm_score, reference[1][f"{key}.itm_logits"])
        if model.is_pruning:
            assert_near(apart.alignment_loss, reference[1][f"{key}.loss_alignment"])
