"""Frozen towers as exported programs and in ONNX runtime, with any batch."""

import pytest
import torch

from madtp_hf import calibrate

from .helpers.clip import make_clip_inputs, make_clip_model


LENGTHS = (12, 5, 16, 8)


class Tower(torch.nn.Module):
    """One tower of CLIP: an image's or a text's features, of their own."""

    def __init__(self, model, modality):
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, inputs):
        features = self.model.get_image_features if self.modality == "vision" else self.model.get_text_features
        return features(inputs).pooler_output


@pytest.fixture(scope="module")
def model():
    model = make_clip_model()
    calibrate(model, [make_clip_inputs(LENGTHS, seed, width=16) for seed in range(4)], [0.5], freeze=True)
    model.set_pruning(reduction=0.5)
    return model


def tower_and_inputs(model, modality):
    name = "pixel_values" if modality == "vision" else "input_ids"
    return Tower(model, modality).eval(), *(
        make_clip_inputs(lengths, seed, width=16)[name] for seed, lengths in ((0, LENGTHS), (7, (16, 3, 9, 4, 11, 2)))
    )


@pytest.mark.parametrize("modality", ("vision", "text"))
def test_an_exported_tower_takes_any_batch(model, modality):
    tower, inputs, others = tower_and_inputs(model, modality)
    shapes = {"inputs": {0: torch.export.Dim("batch", min=2, max=64)}}
    with torch.no_grad():
        program = torch.export.export(tower, (inputs,), dynamic_shapes=shapes, strict=False)
        torch.testing.assert_close(program.module()(others), tower(others))


@pytest.mark.parametrize("modality", ("vision", pytest.param("text", marks=pytest.mark.slow)))
def test_onnx_runtime_gives_what_torch_gives(model, modality, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx needs, is not installed")
    tower, inputs, others = tower_and_inputs(model, modality)
    shapes = {"inputs": {0: torch.export.Dim("batch", min=2, max=64)}}
    with torch.no_grad():
        program = torch.onnx.export(tower, (inputs,), dynamic_shapes=shapes, dynamo=True, verbose=False)
        program.save(tmp_path / "tower.onnx")
        expected = tower(others)
    session = onnxruntime.InferenceSession(tmp_path / "tower.onnx", providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {session.get_inputs()[0].name: others.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), expected, atol=1e-4, rtol=1e-4)


def test_a_frozen_model_compiles_once_and_in_one_piece(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for seed in range(2):
            inputs = make_clip_inputs(LENGTHS, seed)
            expected = model(**inputs).logits_per_image
            torch.testing.assert_close(compiled(**inputs).logits_per_image, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
