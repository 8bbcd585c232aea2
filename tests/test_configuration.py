import pytest

from madtp_hf import MadtpBlipConfig


def test_saved_and_loaded_it_is_the_same(tmp_path):
    config = MadtpBlipConfig(
        num_alignment_tokens=7,
        alignment_dim=24,
        alignment_loss_weight=0.2,
        pruning_temperature=3.5,
        pruning_modalities=("text",),
        pruning_granularity="batch",
        pruning_schedule=[[0.2, 1.0, 0.5], [0.3, 1.0], [0.5, 2.0]],
        pruning_threshold_factor=0.7,
        encoder_token_id=30523,
        text_config={"hidden_size": 48, "num_attention_heads": 4},
        vision_config={"hidden_size": 64},
    )
    config.save_pretrained(tmp_path)
    loaded = MadtpBlipConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.pruning_modalities == ("text",) and loaded.pruning_schedule == config.pruning_schedule
    assert loaded.pruning_threshold_factor == 0.7
    assert loaded.text_config.encoder_hidden_size == 64


def test_defaults():
    config = MadtpBlipConfig()
    assert config.model_type == "madtp_blip" and config.num_alignment_tokens == 100
    assert config.alignment_dim is None and config.alignment_loss_weight == 0.1
    assert config.pruning_temperature == 0.0 and config.pruning_modalities == ("vision", "text")
    assert config.pruning_granularity == "instance" and config.pruning_threshold_factor == 1.0
    assert config.pruning_schedule is None and config.encoder_token_id is None


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_alignment_tokens", 0),
        ("alignment_dim", -3),
        ("alignment_loss_weight", float("nan")),
        ("pruning_temperature", -1.0),
        ("pruning_temperature", float("nan")),
        ("pruning_modalities", ("vision", "audio")),
        ("pruning_threshold_factor", 0.0),
        ("pruning_threshold_factor", 1.5),
        ("pruning_threshold_factor", None),
        ("pruning_modalities", None),
        ("pruning_modalities", "vision"),
        ("pruning_schedule", 0.5),
        ("pruning_schedule", [0.5]),
        ("pruning_granularity", "sample"),
        ("pruning_schedule", [[0.5, 2.0], [0.3, 1.0]]),
        ("pruning_schedule", [[0.5, -2.0]]),
        ("pruning_schedule", [[0.5, 2.0, 0.0]]),
        ("pruning_schedule", [[0.5, 2.0, 2.0]]),
        ("encoder_token_id", 10**6),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*expected"):
        MadtpBlipConfig(**{field: value})
