import pytest

from madtp_hf import MadtpBlipConfig


def test_saved_and_loaded_it_is_the_same(tmp_path):
    config = MadtpBlipConfig(
        num_alignment_tokens=7,
        alignment_dim=24,
        alignment_loss_weight=0.2,
        pruning_setting={"temperature": 3.5, "factor": 0.7},
        pruning_modalities=("text",),
        pruning_granularity="batch",
        pruning_schedule=[[0.2, 1.0, 0.5], [0.3, 1.0], [0.5, 2.0]],
        encoder_token_id=30523,
        text_config={"hidden_size": 48, "num_attention_heads": 4},
        vision_config={"hidden_size": 64},
    )
    config.save_pretrained(tmp_path)
    loaded = MadtpBlipConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.pruning_modalities == ("text",) and loaded.pruning_schedule == config.pruning_schedule
    assert loaded.pruning_temperature == 3.5 and loaded.pruning_setting == {"temperature": 3.5, "factor": 0.7}
    # The lists of version 0.1.0 are read.
    assert loaded.pruning_schedule == [
        {"reduction": 0.2, "temperature": 1.0, "factor": 0.5},
        {"reduction": 0.3, "temperature": 1.0, "factor": 1.0},
        {"reduction": 0.5, "temperature": 2.0, "factor": 1.0},
    ]
    assert loaded.calibrated_reductions == [0.2, 0.3, 0.5]
    assert loaded.text_config.encoder_hidden_size == 64


def test_defaults():
    config = MadtpBlipConfig()
    assert config.model_type == "madtp_blip" and config.num_alignment_tokens == 100
    assert config.alignment_dim is None and config.alignment_loss_weight == 0.1
    assert config.pruning_temperature == 0.0 and config.pruning_modalities == ("vision", "text")
    assert config.pruning_granularity == "instance" and config.pruning_method == "madtp"
    assert config.pruning_setting is None and config.pruning_schedule is None and config.encoder_token_id is None


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_alignment_tokens", 0),
        ("alignment_dim", -3),
        ("alignment_loss_weight", float("nan")),
        ("pruning_temperature", -1.0),
        ("pruning_temperature", float("nan")),
        ("pruning_modalities", ("vision", "audio")),
        ("pruning_setting", {"temperature": 1.0, "factor": 0.0}),
        ("pruning_setting", {"temperature": 1.0, "factor": 1.5}),
        ("pruning_setting", {"temperature": 0.0}),
        ("pruning_setting", {"keep_rate": "0.5"}),
        ("pruning_setting", 0.5),
        ("pruning_method", ""),
        ("pruning_method", None),
        ("pruning_schedule", [{"temperature": 1.0}]),
        ("pruning_schedule", [{"reduction": 0.5}]),
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


def test_the_temperature_is_a_view_of_the_setting(tmp_path):
    config = MadtpBlipConfig(pruning_temperature=2.0)
    assert config.pruning_setting == {"temperature": 2.0, "factor": 1.0}
    config.pruning_setting = {"temperature": 3.0, "factor": 0.5}
    assert config.pruning_temperature == 3.0 and config.to_dict()["pruning_temperature"] == 3.0
    config.pruning_temperature = 4.0
    assert config.pruning_setting == {"temperature": 4.0, "factor": 0.5}
    config.save_pretrained(tmp_path)
    loaded = MadtpBlipConfig.from_pretrained(tmp_path, pruning_temperature=1.0)
    assert loaded.pruning_temperature == 1.0
    config.pruning_temperature = 0.0
    assert config.pruning_setting is None and config.pruning_temperature == 0.0


def test_another_methods_setting_is_saved(tmp_path):
    config = MadtpBlipConfig(pruning_method="tome", pruning_setting={"r": 8})
    config.save_pretrained(tmp_path)
    loaded = MadtpBlipConfig.from_pretrained(tmp_path)
    assert loaded.pruning_method == "tome" and loaded.pruning_setting == {"r": 8} and loaded.pruning_temperature == 0.0
