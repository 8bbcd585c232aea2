"""Holds a model to a golden case: what is compared, and how near it has to be. Needs no pytest; on any device."""

import torch

from madtp_hf.checkpoints.convert import convert_original_checkpoint
from madtp_hf.modeling.configuration_madtp_blip import MadtpBlipConfig


INPUTS = ("pixel_values", "input_ids", "labels")


def load_model(cases, weights, task):
    """The model of a task from its original state dict, or the file that holds it, and the sizes in `cases`."""
    sizes = cases["config"]
    config = MadtpBlipConfig(
        text_config={
            "num_attention_heads": sizes["heads"],
            "layer_norm_eps": sizes["text_layer_norm_eps"],
            "bos_token_id": sizes["dec_token_id"],
        },
        vision_config={"num_attention_heads": sizes["heads"], "layer_norm_eps": sizes["vision_layer_norm_eps"]},
    )
    return convert_original_checkpoint(weights, task, config=config)


def assert_near(value, expected):
    torch.testing.assert_close(value, expected.view_as(value), atol=1e-4, rtol=0)


def assert_same_set(states, expected):
    """The class token first, the others in any order."""
    assert_near(states[:, 0], expected[:, 0])
    for mine, theirs in zip(states, expected, strict=True):
        distance = torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(len(theirs)))
        assert_near(mine, theirs[nearest])


def assert_counts(counts, expected):
    """The largest count over what ran at once, after each layer."""
    assert counts[1:].flatten(1).amax(1).tolist() == expected


def check_vqa(model, inputs, expected, counts):
    output = model(**inputs)
    assert_counts(output.vision_tokens, counts["vision"])
    assert_counts(output.text_tokens, counts["text"])
    assert_near(output.logits, expected["answer_logits"])
    assert_same_set(output.image_embeds, expected["image_embeds"])
    assert_same_set(output.question_states, expected["question_states"])
    # Theirs is the sum over an answer's tokens, averaged over the batch; ours the mean over tokens, as transformers'.
    assert_near(output.task_loss * (inputs["labels"].shape[1] - 1), expected["loss_task"])
    return output


def check_nlvr2(model, inputs, expected, counts):
    # All left images, then all right ones -> the pairs.
    output = model(**{**inputs, "pixel_values": torch.stack(inputs["pixel_values"].chunk(2), dim=1)})
    assert_counts(output.vision_tokens, counts["vision"])
    assert_counts(output.text_tokens, counts["text"])
    assert_near(output.logits, expected["logits"])
    assert_near(output.task_loss, expected["loss_task"])
    assert_same_set(output.image_embeds.transpose(0, 1).flatten(0, 1), expected["image_embeds"])
    return output


def check_captioning(model, inputs, expected, counts):
    output = model(**inputs)
    assert_counts(output.vision_tokens, counts["vision"])
    assert_near(output.logits, expected["logits"])
    assert_near(output.loss, expected["loss_task"])
    assert_same_set(output.image_embeds, expected["image_embeds"])
    return output


def check_retrieval(model, inputs, expected, counts):
    apart, matching = model(**inputs, use_itm_head=False), model(**inputs)
    for output in (apart, matching):
        assert_counts(output.vision_tokens, counts["vision"])
    assert_counts(apart.text_tokens, counts["text"])
    assert_counts(matching.text_tokens, counts["text_matching"])
    assert_near(model.get_image_features(inputs["pixel_values"]).pooler_output, expected["image_feature"])
    assert_near(model.get_text_features(inputs["input_ids"]).pooler_output, expected["text_feature"])
    assert_near(apart.image_feature, expected["image_feature"])
    assert_near(apart.text_feature, expected["text_feature"])
    assert_near(matching.itm_score, expected["itm_logits"])
    return apart


CHECKS = {"vqa": check_vqa, "nlvr2": check_nlvr2, "captioning": check_captioning, "retrieval": check_retrieval}


@torch.no_grad()
def check_case(model, cases, tensors, task, case, granularity):
    """Hold `model`, of `task`, to all that was recorded of a case: `cases` and its `tensors`, on the model's device.

    Raises:
        AssertionError: where the model gives something else.
    """
    model.config.pruning_granularity = granularity
    start = f"{task}.{case}."
    inputs = {name: tensors[start + name] for name in INPUTS if start + name in tensors}
    entries = {entry["key"]: entry for entry in cases["cases"] if entry["key"].startswith(start)}
    assert list(entries) == [f"{start}tau{temperature}" for temperature in (0, 1, 4, 16)]
    for key, entry in entries.items():
        temperature = float(key.rpartition("tau")[2])
        model.set_pruning(temperature=temperature)
        expected = {name.removeprefix(f"{key}."): t for name, t in tensors.items() if name.startswith(f"{key}.")}
        counts = dict(entry["tokens_after_each_layer"])
        counts["text_matching"] = entry.get("tokens_after_each_layer_matching")
        output = CHECKS[task](model, inputs, expected, counts)
        # The text stack of captioning prunes nothing, and none of its alignment losses is recorded.
        if temperature > 0 and task != "captioning":
            assert_near(output.alignment_loss, expected["loss_alignment"])
