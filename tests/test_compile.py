"""torch.compile, torch.export and torch.jit.trace on pruned models whose token counts are not frozen."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from .conftest import TASKS, make_task_model
from .helpers.clip import make_clip_inputs, make_clip_model
from .test_static_shapes import scores


MODELS = {
    "clip": (make_clip_model, make_clip_inputs),
    **{task: (lambda task=task: make_task_model(task), TASKS[task].make_inputs) for task in ("vqa", "captioning")},
}
BATCHES = ((9, 5, 7), (8, 4, 6, 5), (12, 3), (5, 7, 9, 11, 13), (6, 10, 4, 8, 9, 3))


@pytest.mark.parametrize(
    "name, method",
    [
        ("vqa", "madtp"),
        ("clip", "madtp"),
        pytest.param("captioning", "madtp", marks=pytest.mark.slow),
        pytest.param("vqa", "madtp_merge", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_pruned_model_is_not_compiled_anew_after_the_third_shape(name, method):
    make_model, make_batch = MODELS[name]
    model = make_model().eval()
    model.set_pruning_method(method)
    model.set_pruning(temperature=3.0)
    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    compiled = torch.compile(model, backend=counter)
    for lengths in BATCHES:
        batch = make_batch(lengths)
        mine, expected = compiled(**batch), model(**batch)
        torch.testing.assert_close(mine.vision_tokens, expected.vision_tokens)
        read = (lambda output: output.logits_per_text) if name == "clip" else scores
        torch.testing.assert_close(read(mine), read(expected), atol=1e-4, rtol=1e-4)
        counts.append(counter.frame_count)
    assert counts[2:] == [counts[2]] * 3 and counts[0] <= 3 and counts[2] <= 8, counts
    torch._dynamo.reset()


class Images(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values).pooler_output


@pytest.mark.parametrize("make_model", [lambda: make_task_model("retrieval"), make_clip_model], ids=["blip", "clip"])
@pytest.mark.parametrize("export", [torch.export.export, torch.jit.trace])
def test_recording_shapes_that_depend_on_values_names_what_to_do(make_model, export):
    model, pixels = make_model().eval(), make_clip_inputs()["pixel_values"]
    model.set_pruning(temperature=3.0)
    with pytest.raises(RuntimeError, match=r"shapes that depend on values.*calibrate\(.*freeze=True\)"):
        export(Images(model), (pixels,))
    model.set_pruning(None)
    if export is torch.export.export:
        torch.testing.assert_close(export(Images(model), (pixels,)).module()(pixels), Images(model)(pixels))
