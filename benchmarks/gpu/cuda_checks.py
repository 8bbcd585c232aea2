"""The checks of the GPU benchmark: the device against what was recorded, against the CPU, and against transformers.

Each check returns a list of rows, dicts with `check` and what was found; `passed` is None where there is a number to
read and no bound.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cuda_models import ROOT, calibrated, kernels, make_inputs, make_models, one_sample

from madtp_hf.modeling import triton_kernels


FLOAT32_BOUND = 1e-3  # of the largest output, between two orders of the same sums
BFLOAT16_BOUND = 2.0  # times transformers' own distance from float32
WHOLE = (ROOT.parent / "shared" / "reference", ROOT / "shared" / "reference")


def precise() -> None:
    """float32 is float32: no TF32, which cuDNN's convolutions take by default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, over the largest number of `theirs`."""
    mine, theirs = mine.detach().float().cpu(), theirs.detach().float().cpu()
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


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


def golden_cases(whole: Path | None):
    """What cases.json holds, tensors, and a function: task -> its original weights."""
    from tests import golden

    if whole is not None:
        from safetensors.torch import load_file

        tensors = load_file(whole / "cases.safetensors")
        return (
            json.loads((whole / "cases.json").read_text()),
            tensors,
            lambda task: whole / f"{task}.weights.safetensors",
        )
    cases, tensors = golden.load_cases()
    weights = golden.load_weights()
    tensors = {name: torch.from_numpy(values) for name, values in tensors.items()}
    return cases, tensors, lambda task: {name: torch.from_numpy(values) for name, values in weights[task].items()}


def check_golden(device, size, deadline: float) -> list[dict]:
    from tests.golden.comparison import check_case, load_model

    rows = []
    whole = next((folder for folder in WHOLE if folder.is_dir()), None) if device.type == "cuda" else None
    cases, tensors, weights = golden_cases(whole)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    keys = sorted({tuple(entry["key"].split(".")[:2]) for entry in cases["cases"]})
    models = {
        task: load_model(cases, weights(task), task).to(device).eval() for task in sorted({task for task, _ in keys})
    }
    for on in (True, False) if device.type == "cuda" else (False,):
        for task, case in keys:
            # NLVR2 runs two images at once, case 3 three samples: recorded in batch granularity.
            for granularity in ("batch",) if task == "nlvr2" or case == "3" else ("instance", "batch"):
                if time.time() > deadline:
                    return [*rows, {"check": "golden", "passed": None, "note": "not all: out of time"}]
                with kernels(on) as state:
                    row = {"check": f"golden {task} {case} {granularity}", "kernels": state.on, "passed": True}
                    try:
                        check_case(models[task], cases, tensors, task, case, granularity)
                    except AssertionError as error:
                        row |= {"passed": False, "note": str(error)[:300]}
                rows.append(row | ({"kernel_error": state.error} if state.error else {}))
    return rows


# Against transformers, the CPU, and ourselves


@torch.no_grad()
def check_parity(device, size, deadline: float) -> list[dict]:
    """Pruning off against transformers' BLIP; in bfloat16 both against transformers' in float32."""
    rows = []
    for task, name in (("vqa", "image_embeds"), ("captioning", "logits"), ("retrieval", "itm_score")):
        dense, model = make_models(task, size, device)
        inputs = make_inputs(task, model.config, 2, device)
        real = inputs["attention_mask"].bool()

        def scores(model, inputs, name=name, real=real):
            output = model(**inputs)[name]
            return (
                output[real] if name == "logits" else output
            )  # at padding transformers' decoder gives something else

        expected = scores(dense, inputs)
        found = difference(scores(model, inputs), expected)
        rows.append({"check": f"parity {task} float32", "difference": found, "passed": found < FLOAT32_BOUND})
        dense, model = dense.to(torch.bfloat16), model.to(torch.bfloat16)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        theirs, ours = (difference(scores(m, inputs), expected) for m in (dense, model))
        rows.append(
            {
                "check": f"parity {task} bfloat16",
                "difference": ours,
                "transformers": theirs,
                "passed": ours < max(BFLOAT16_BOUND * theirs, FLOAT32_BOUND),
            }
        )
    return rows


def pruned_vqa(device, size, samples: int):
    """A float32 model with a schedule, inputs, and the temperature of its first reduction."""
    model = make_models("vqa", size, device)[1]
    schedule = calibrated(model, samples, [0.5])
    return model, make_inputs("vqa", model.config, 4, device), schedule[0]["temperature"]


@torch.no_grad()
def check_batch_invariance(device, size, deadline: float, model, inputs, temperature) -> list[dict]:
    """Each sample alone against itself in the batch. Pruned, its padding goes as well; off, the decoder reads it."""
    rows = []
    for label, value in (("off", 0.0), ("pruned", temperature)):
        model.set_pruning(temperature=value)
        for on in (True, False) if device.type == "cuda" else (False,):
            with kernels(on) as state:
                together = model(**inputs)
                alone = [
                    model(**one_sample(inputs, index, unpad=value > 0)) for index in range(len(inputs["pixel_values"]))
                ]
            found = max(difference(single.logits[0], together.logits[index]) for index, single in enumerate(alone))
            counts = all(
                torch.equal(single.vision_tokens[:, 0], together.vision_tokens[:, index])
                and torch.equal(single.text_tokens[:, 0], together.text_tokens[:, index])
                for index, single in enumerate(alone)
            )
            rows.append(
                {
                    "check": f"batch invariance {label}",
                    "kernels": state.on,
                    "difference": found,
                    "same_counts": counts,
                    "passed": counts and found < FLOAT32_BOUND and not state.error,
                    "kernel_error": state.error,
                }
            )
    return rows


@torch.no_grad()
def check_kernels(device, size, deadline: float, model, inputs, temperature) -> list[dict]:
    """The same model with Triton's kernels and without, in float32 and bfloat16; and float32 against the CPU."""
    if device.type != "cuda":
        return [{"check": "kernels against the plain path", "passed": None, "note": "skipped: no CUDA"}]
    model.set_pruning(temperature=temperature)
    if not triton_kernels.is_available(torch.empty(1, 1, 64, device=device)):
        return [
            {"check": "kernels against the plain path", "passed": False, "note": "Triton's kernels are not available"}
        ]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        typed = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
        with kernels(True) as state:
            fast, again = model(**typed), model(**typed)
        with kernels(False):
            plain = model(**typed)
        found = difference(fast.logits, plain.logits)
        exact = same_counts(fast, plain)
        rows.append(
            {
                "check": f"kernels against the plain path {str(dtype).removeprefix('torch.')}",
                "difference": found,
                **count_differences(fast, plain),
                "repeats": torch.equal(fast.logits, again.logits),
                # In bfloat16 a token at the threshold falls on either side.
                "passed": state.error is None
                and (found < FLOAT32_BOUND and exact if dtype == torch.float32 else None),
                "kernel_error": state.error,
            }
        )
    with kernels(False):
        on_device = make_models("vqa", size, device)[1]  # bfloat16 has rounded the other's weights
        on_device.set_pruning(temperature=temperature)
        two = {name: value[:2] for name, value in inputs.items()}
        output = on_device(**two)
        expected = on_device.cpu()(**{name: value.cpu() for name, value in two.items()})
    found = difference(output.logits, expected.logits)
    rows.append(
        {
            "check": "float32 against the CPU",
            "difference": found,
            **count_differences(output, expected),
            "passed": found < FLOAT32_BOUND and same_counts(output, expected),
        }
    )
    return rows


@torch.no_grad()
def check_generate(device, size, deadline: float) -> list[dict]:
    """Pruning off writes what transformers writes; pruned, kernels write what the plain path writes."""
    dense, model = make_models("captioning", size, device)
    pixel_values = make_inputs("captioning", model.config, 3, device)["pixel_values"]
    lengths = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    rows = []
    for beams in (1, 3):
        same = torch.equal(
            model.generate(pixel_values, num_beams=beams, **lengths),
            dense.generate(pixel_values, num_beams=beams, **lengths),
        )
        rows.append({"check": f"generate off, {beams} beams, as transformers", "passed": same})
    model.set_pruning(temperature=1.0)
    written = []
    for on in (True, False):
        with kernels(on) as state:
            written.append(model.generate(pixel_values, num_beams=1, **lengths))
        if on:
            error = state.error
    same = torch.equal(*written)
    rows.append({"check": "generate pruned, kernels as plain", "passed": same and not error, "kernel_error": error})
    return rows


def check_training(device, size, deadline: float) -> list[dict]:
    """A training step of the tiny model: its loss, and each gradient against the CPU's in float32."""
    model = make_models("vqa", "tiny", device)[1].train()
    model.set_pruning(temperature=1.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = make_inputs("vqa", model.config, 4, device)
    inputs["labels"] = inputs["input_ids"][:, :4].clone()
    inputs["labels"][:, 0] = inputs.pop("decoder_input_ids")[:, 0]
    gradients, losses, counts = [], [], []
    for place in (device, torch.device("cpu")):
        model = model.to(place)
        model.zero_grad(set_to_none=True)
        output = model(**{name: value.to(place) for name, value in inputs.items()})
        output.loss.backward()
        losses.append(output.loss.item())
        counts.append(output)
        gradients.append({name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None})
    mine, theirs = gradients
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    apart = {name: (mine[name] - theirs[name]).abs().max().item() / largest for name in theirs}
    worst = max(apart, key=apart.get)
    finite = all(torch.isfinite(torch.tensor(losses))) and all(g.isfinite().all() for g in mine.values())
    row = {
        "check": "training step, float32, against the CPU",
        "loss": losses[0],
        "loss_on_cpu": losses[1],
        "gradient_difference": apart[worst],
        "of": worst,
        **count_differences(*counts),
        "passed": bool(finite) and mine.keys() == theirs.keys() and apart[worst] < FLOAT32_BOUND,
    }
    return [row]


def run_checks(device, size: str, deadline: float, record: Callable) -> None:
    """All checks, each recorded as it ends; one that raises is a row that did not pass."""
    precise()
    on_cuda = device.type == "cuda"

    def attempt(check, *arguments):
        if time.time() > deadline:
            record("check", {"check": check.__name__, "passed": None, "note": "not started: out of time"})
            return
        started = time.time()
        try:
            rows = check(device, size, deadline, *arguments)
        except Exception as error:
            rows = [{"check": check.__name__, "passed": False, "note": f"{type(error).__name__}: {str(error)[:500]}"}]
        for row in rows:
            record("check", {name: value for name, value in row.items() if value is not None or name == "passed"})
        print(f"  {check.__name__}: {time.time() - started:.1f} s", flush=True)
        if on_cuda:
            try:
                torch.cuda.synchronize()
            except Exception as error:
                sys.exit(f"the device is lost in {check.__name__}: {error}")

    # A kernel that breaks the device comes after what needs none.
    for check in (check_parity, check_training, check_generate):
        attempt(check)
    try:
        with kernels(False):
            pruned = pruned_vqa(device, size, samples=8 if on_cuda else 4)
    except Exception as error:
        message = f"{type(error).__name__}: {str(error)[:500]}"
        record("check", {"check": "calibration in float32", "passed": False, "note": message})
    else:
        for check in (check_batch_invariance, check_kernels):
            attempt(check, *pruned)
    attempt(check_golden)
