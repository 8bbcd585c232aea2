"""The checks of the GPU benchmark: the device against what was recorded, against the CPU, and against transformers.

Each check returns a list of rows, dicts with `check` and what was found; `passed` is None where there is a number to
read and no bound.
"""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable

import torch
from calibrating import calibrate_all
from random_models import Setup, add_labels, calibration_batches, make_inputs, make_models

from madtp_hf.modeling import triton_kernels


FLOAT32_BOUND = 1e-3  # of the largest output, between two orders of the same sums
BFLOAT16_BOUND = 2.0  # times transformers' own distance from float32


class Kernels:
    """Whether Triton's kernels are `on`, and the message of one that failed, or None."""

    def __init__(self, on: bool):
        self.on, self.error = on, None


@contextlib.contextmanager
def kernels(on: bool):
    """Switch Triton's kernels on or off; those that are disabled, or that fail, stay off."""
    before = triton_kernels._enabled
    state = Kernels(on and before)
    triton_kernels._enabled = state.on
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield state
    finally:
        messages = [str(warning.message) for warning in caught]
        state.error = next((text for text in messages if "Triton kernels are disabled" in text), None)
        # A kernel that failed would fail again at each call.
        triton_kernels._enabled = before and state.error is None


def with_and_without(device: torch.device) -> tuple[bool, ...]:
    """What `kernels` is called with on a device."""
    return (True, False) if device.type == "cuda" else (False,)


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, over the largest number of `theirs`."""
    mine, theirs = mine.detach().float().cpu(), theirs.detach().float().cpu()
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def one_sample(inputs: dict, index: int, unpad: bool) -> dict:
    """Return row `index` of a batch by itself, with `unpad` without the padding of its text."""
    length = int(inputs["attention_mask"][index].sum()) if unpad else None
    sample = {name: value[index : index + 1] for name, value in inputs.items()}
    return {k: v[:, :length] if k in ("input_ids", "attention_mask") else v for k, v in sample.items()}


def to(inputs: dict, place) -> dict:
    """Move or convert the inputs; only images have a floating dtype."""
    return {
        name: value.to(place) if value.is_floating_point() or isinstance(place, torch.device) else value
        for name, value in inputs.items()
    }


def count_differences(output, other) -> dict:
    """How many of the token counts (layer, sample) differ between two outputs, and by how many tokens at most."""
    found = {}
    for branch in ("vision_tokens", "text_tokens"):
        mine, theirs = output.get(branch), other.get(branch)
        if mine is not None:
            apart = (mine.cpu() - theirs.cpu()).abs()
            found[branch] = f"{int((apart > 0).sum())} of {apart.numel()} differ, by {int(apart.max())} at most"
    return found


def same_counts(output, other) -> bool:
    return all(
        output.get(branch) is None or torch.equal(output[branch].cpu(), other[branch].cpu())
        for branch in ("vision_tokens", "text_tokens")
    )


# Golden cases


def check_golden(setup: Setup, deadline: float) -> list[dict]:
    from tests import golden
    from tests.golden.comparison import check_case, load_model

    rows, device = [], setup.device
    (cases, tensors), weights = golden.load_cases(), golden.load_weights()
    tensors = {name: torch.from_numpy(values).to(device) for name, values in tensors.items()}
    keys = sorted({tuple(entry["key"].split(".")[:2]) for entry in cases["cases"]})
    models = {}
    for task in {task for task, _ in keys}:
        original = {name: torch.from_numpy(values) for name, values in weights[task].items()}
        models[task] = load_model(cases, original, task).to(device).eval()
    # NLVR2 runs two images at once, case 3 three samples: recorded in batch granularity.
    every = [
        (on, task, case, granularity)
        for on in with_and_without(device)
        for task, case in keys
        for granularity in (("batch",) if task == "nlvr2" or case == "3" else ("instance", "batch"))
    ]
    for on, task, case, granularity in every:
        if time.time() > deadline:
            return [*rows, {"check": "golden", "passed": None, "note": "not all: out of time"}]
        row = {"check": f"golden {task} {case} {granularity}", "passed": True}
        with kernels(on) as state:
            try:
                check_case(models[task], cases, tensors, task, case, granularity)
            except AssertionError as error:
                row |= {"passed": False, "note": str(error)[:300]}
        rows.append({**row, "kernels": state.on, "kernel_error": state.error})
    return rows


# Against transformers, the CPU, and ourselves


@torch.no_grad()
def check_parity(setup: Setup) -> list[dict]:
    """Pruning off against transformers' BLIP; in bfloat16 both against transformers' in float32."""
    rows = []
    for task, name in (("vqa", "image_embeds"), ("captioning", "logits"), ("retrieval", "itm_score")):
        dense, model = make_models(task, setup)
        inputs = make_inputs(task, model.config, 2, setup)
        real = inputs["attention_mask"].bool()

        def scores(model, inputs, name=name, real=real):
            output = model(**inputs)[name]
            return (
                output[real] if name == "logits" else output
            )  # at padding transformers' decoder gives something else

        expected = scores(dense, inputs)
        found = difference(scores(model, inputs), expected)
        rows.append({"check": f"parity {task} float32", "difference": found, "passed": found < FLOAT32_BOUND})
        inputs = to(inputs, torch.bfloat16)
        theirs, ours = (difference(scores(m.to(torch.bfloat16), inputs), expected) for m in (dense, model))
        passed = ours < max(BFLOAT16_BOUND * theirs, FLOAT32_BOUND)
        row = {"check": f"parity {task} bfloat16", "difference": ours, "transformers": theirs, "passed": passed}
        rows.append(row)
    return rows


def pruned_vqa(setup: Setup, samples: int):
    """Return a float32 model with a schedule, inputs, and its first reduction."""
    model = make_models("vqa", setup)[1]
    reductions = calibrate_all(model, calibration_batches("vqa", model.config, samples, setup), [0.5])
    return model, make_inputs("vqa", model.config, 4, setup), reductions[0]


@torch.no_grad()
def check_batch_invariance(setup: Setup, model, inputs, reduction) -> list[dict]:
    """Each sample alone against itself in the batch. Pruned, its padding goes as well; off, the decoder reads it."""
    rows = []
    for label, value in (("off", 0.0), ("pruned", reduction)):
        model.set_pruning(reduction=value)
        for on in with_and_without(setup.device):
            with kernels(on) as state:
                together = model(**inputs)
                number = len(inputs["pixel_values"])
                alone = [model(**one_sample(inputs, index, unpad=value > 0)) for index in range(number)]
            found = max(difference(single.logits[0], together.logits[index]) for index, single in enumerate(alone))
            counts = all(
                torch.equal(single[branch][:, 0], together[branch][:, index])
                for index, single in enumerate(alone)
                for branch in ("vision_tokens", "text_tokens")
            )
            row = {"check": f"batch invariance {label}", "kernels": state.on, "difference": found}
            row |= {"same_counts": counts, "kernel_error": state.error}
            rows.append({**row, "passed": counts and found < FLOAT32_BOUND and not state.error})
    return rows


@torch.no_grad()
def check_kernels(setup: Setup, model, inputs, reduction) -> list[dict]:
    """The same model with Triton's kernels and without, in float32 and bfloat16; and float32 against the CPU."""
    name = "kernels against the plain path"
    if setup.device.type != "cuda":
        return [{"check": name, "passed": None, "note": "skipped: no CUDA"}]
    if not triton_kernels.is_available(torch.empty(1, 1, 64, device=setup.device)):
        return [{"check": name, "passed": False, "note": "Triton's kernels are not available"}]
    model.set_pruning(reduction=reduction)
    rows = []
    with kernels(False):
        two = {name: value[:2] for name, value in inputs.items()}
        output = model(**two)
        expected = model.cpu()(**to(two, torch.device("cpu")))
        model.to(setup.device)
    found, same = difference(output.logits, expected.logits), same_counts(output, expected)
    row = {"check": "float32 against the CPU", "difference": found, **count_differences(output, expected)}
    rows.append({**row, "passed": found < FLOAT32_BOUND and same})
    rows += compare_kernels(model, inputs, name)
    model.set_pruning_method("madtp_merge")
    model.set_pruning(temperature=1.0)
    return rows + compare_kernels(model.float(), inputs, f"{name}, merging,")


def compare_kernels(model, inputs, name: str) -> list[dict]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model, typed = model.to(dtype), to(inputs, dtype)
        with kernels(True) as state:
            fast, again = model(**typed), model(**typed)
        with kernels(False):
            plain = model(**typed)
        found, same = difference(fast.logits, plain.logits), same_counts(fast, plain)
        row = {"check": f"{name} {str(dtype).removeprefix('torch.')}", "difference": found}
        row |= {**count_differences(fast, plain), "repeats": torch.equal(fast.logits, again.logits)}
        # In bfloat16 a token at the threshold falls on either side.
        passed = (found < FLOAT32_BOUND and same) if dtype == torch.float32 else None
        rows.append({**row, "passed": False if state.error else passed, "kernel_error": state.error})
    return rows


@torch.no_grad()
def check_generate(setup: Setup) -> list[dict]:
    """Pruning off writes what transformers writes; pruned, kernels write what the plain path writes."""
    dense, model = make_models("captioning", setup)
    pixel_values = make_inputs("captioning", model.config, 3, setup)["pixel_values"]
    lengths = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    rows = []
    for beams in (1, 3):
        ours, theirs = (found.generate(pixel_values, num_beams=beams, **lengths) for found in (model, dense))
        rows.append({"check": f"generate off, {beams} beams, as transformers", "passed": torch.equal(ours, theirs)})
    model.set_pruning(temperature=1.0)
    written, errors = [], []
    for on in (True, False):
        with kernels(on) as state:
            written.append(model.generate(pixel_values, num_beams=1, **lengths))
        errors.append(state.error)
    passed = torch.equal(*written) and not errors[0]
    return [*rows, {"check": "generate pruned, kernels as plain", "passed": passed, "kernel_error": errors[0]}]


def check_training(setup: Setup) -> list[dict]:
    """A training step of the tiny model: its loss, and each gradient against the CPU's in float32."""
    setup = setup._replace(size="tiny")
    model = make_models("vqa", setup)[1].train()
    model.set_pruning(temperature=1.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = add_labels(make_inputs("vqa", model.config, 4, setup))
    outputs, gradients = [], []
    for place in (setup.device, torch.device("cpu")):
        model = model.to(place)
        model.zero_grad(set_to_none=True)
        outputs.append(model(**to(inputs, place)))
        outputs[-1].loss.backward()
        gradients.append({name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None})
    mine, theirs = gradients
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    apart = {name: (mine[name] - theirs[name]).abs().max().item() / largest for name in theirs}
    worst, losses = max(apart, key=apart.get), [output.loss.item() for output in outputs]
    finite = torch.isfinite(torch.tensor(losses)).all() and all(g.isfinite().all() for g in mine.values())
    row = {"check": "training step, float32, against the CPU", "loss": losses[0], "loss_on_cpu": losses[1]}
    row |= {"gradient_difference": apart[worst], "of": worst, **count_differences(*outputs)}
    return [{**row, "passed": bool(finite) and mine.keys() == theirs.keys() and apart[worst] < FLOAT32_BOUND}]


def run_checks(setup: Setup, deadline: float, record: Callable) -> None:
    """Run all checks, each recorded as it ends; one that raises is a row that did not pass."""
    # float32 is float32: no TF32, which cuDNN's convolutions take by default.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    on_cuda = setup.device.type == "cuda"

    def attempt(check, *arguments):
        name, started = check.__name__, time.time()
        if started > deadline:
            rows = [{"check": name, "passed": None, "note": "not started: out of time"}]
        else:
            try:
                rows = check(setup, *arguments)
            except Exception as error:
                rows = [{"check": name, "passed": False, "note": f"{type(error).__name__}: {str(error)[:500]}"}]
        for row in rows:
            record("check", {name: value for name, value in row.items() if value is not None or name == "passed"})
        print(f"  {name}: {time.time() - started:.1f} s", flush=True)
        if on_cuda:
            try:
                torch.cuda.synchronize()
            except Exception as error:
                sys.exit(f"the device is lost in {name}: {error}")

    def check_pruned(setup):  # both need the same calibrated model
        with kernels(False):
            pruned = pruned_vqa(setup, samples=8 if on_cuda else 4)
        for check in (check_batch_invariance, check_kernels):
            attempt(check, *pruned)
        return []

    # A kernel that breaks the device comes after what needs none.
    for check in (check_parity, check_training, check_generate, check_pruned):
        attempt(check)
    attempt(check_golden, deadline)
