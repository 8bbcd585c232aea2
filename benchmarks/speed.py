"""Measure the speed-up of pruned models over transformers' BLIP and CLIP, and over other token reduction methods.

The other methods run at equal FLOPs. All runs are interleaved in one process: each round times every run once, so that
a slowdown of the machine affects all of them, and transformers' time in a round is compared with the run's time in the
same round. Weights are random, sizes are BLIP-base's; images are crops of real photographs.

    python benchmarks/speed.py --output benchmarks/results/speed_cpu.json
    python benchmarks/speed.py --device cuda --dtype bfloat16 --batch_sizes 1 32 256 \\
        --output benchmarks/results/speed_cuda.json
    python benchmarks/speed.py --tasks --training_step --output benchmarks/results/speed_cpu.json
    python benchmarks/speed.py --tasks clip clip-large --baselines tome \\
        --output benchmarks/results/speed_clip_cpu.json
    python benchmarks/speed.py --size tiny --rounds 2 --tasks vqa --batch_sizes 4   # a quick trial

Runs: `transformers`, its BLIP (for NLVR2, which it lacks, a reference built from its parts); `off`, ours without
pruning; `instance` and `batch`, pruned in that granularity; `tome`, `evit` and `random`, see methods.py. Captioning is
timed twice, as a teacher-forced forward pass (`captioning`) and as generation (`captioning-generate`); retrieval is
the pass that matches an image and a text. `clip` is ViT-B/16 at 224 pixels and `clip-large` ViT-L/14 at 336; texts are
padded to CLIP's 77 tokens, a common use of its tokenizer, and are timed alone as well (`clip-text`).

Columns: `time ratio` and its quartiles, transformers' time over the run's; `FLOPs ratio`, likewise and exact for the
timed batch; `efficiency`, time ratio over FLOPs ratio, 1 if the speed-up equals the FLOPs reduction; `memory
ratio`, the run's peak memory of activations over transformers'; `computed`, tokens that the encoders' feed-forward
layers computed over those that had to be computed. Token counts per layer are in the file. `mixed` rows, at the
largest batch size, are not timed: they show how images of different kinds in one batch affect the token counts.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from methods import FIXED, find_schedule, make_method
from nlvr2_reference import BlipForImagesAndText
from photographs import mixed_images, photograph_crops
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
)

from madtp_hf import MadtpClipModel, calibrate, count_flops
from madtp_hf.budgets.flops import dense_flops
from madtp_hf.budgets.passes import decoder_tokens, measure
from madtp_hf.tasks import TASKS


# The transformers model that ours is made from.
MODELS = {
    "vqa": BlipForQuestionAnswering,
    "nlvr2": BlipForImageTextRetrieval,
    "captioning": BlipForConditionalGeneration,
    "retrieval": BlipForImageTextRetrieval,
    "clip": CLIPModel,
    "clip-large": CLIPModel,
}
TEXT_TOKENS = {"vqa": 12, "nlvr2": 36, "captioning": 12, "retrieval": 12, "clip": 14}  # special tokens included
TEXT_SPREAD = 0.3  # the texts of a batch are shorter or longer by up to this share
ANSWER_TOKENS = 4  # of the answers in a training step
NUM_BEAMS, NEW_TOKENS = 3, 10  # for caption generation
CALIBRATION_BATCH = 8
SIZES = ("base", "narrow", "tiny")
# The output that transformers' model and ours must agree on with pruning off.
SHARED_OUTPUT = {
    "vqa": "image_embeds",
    "nlvr2": "logits",
    "captioning": "logits",
    "retrieval": "itm_score",
    "clip": "logits_per_image",
}


# Models and inputs


def blip_config(size: str) -> BlipConfig:
    """Return a BLIP configuration of size base, narrow (with base's layers and tokens) or tiny."""
    if size == "base":
        return BlipConfig(
            text_config={"num_attention_heads": 12},
            # with transformers' default for the vision tower, 1e-10, all patches are equal
            vision_config={"image_size": 384, "initializer_range": 0.02},
        )
    width = {"narrow": 64, "tiny": 32}[size]
    # Heads of 16, the smallest size that the kernels accept.
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 16}
    shared = {**sizes, "initializer_range": 0.2}
    text = {"vocab_size": 200, "bos_token_id": 198, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0, **shared}
    vision = {"image_size": 384, "patch_size": 16, **shared}
    if size == "tiny":
        text["num_hidden_layers"] = 8
        vision |= {"num_hidden_layers": 6, "image_size": 96, "patch_size": 8}
    return BlipConfig(text_config=text, vision_config=vision, initializer_range=0.2)


def clip_config(task: str, size: str) -> CLIPConfig:
    """Return a CLIP configuration: base (ViT-B/16 at 224 pixels; `clip-large`: ViT-L/14 at 336), narrow or tiny.

    narrow has base's layers and tokens.
    """
    large = task == "clip-large"
    vision = {"num_hidden_layers": 24, "patch_size": 14, "image_size": 336} if large else {"patch_size": 16}
    text = {}
    if size == "base" and large:
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    elif size != "base":
        width = {"narrow": 64, "tiny": 32}[size]
        text = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 16}
        text |= {"vocab_size": 200, "bos_token_id": 198, "eos_token_id": 199, "pad_token_id": 199}
        vision |= {name: value for name, value in text.items() if name.endswith(("size", "heads")) and name[0] != "v"}
    if size == "tiny":
        vision |= {"num_hidden_layers": 6, "image_size": 96, "patch_size": 8}
    # A larger factor, so that patches differ: with CLIP's own, random weights make them all equal.
    return CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=768 if large else 512, initializer_factor=2.0
    )


def make_models(task: str, args) -> tuple[nn.Module, nn.Module]:
    """Return transformers' model and ours with the same random weights."""
    torch.manual_seed(args.seed)
    is_clip = MODELS[task] is CLIPModel
    config = clip_config(task, args.size) if is_clip else blip_config(args.size)
    dense = MODELS[task](config).to(device=args.device, dtype=args.torch_dtype).eval()
    model = MadtpClipModel.from_clip(dense) if is_clip else TASKS[task].model_class.from_blip(dense)
    if args.device.type == "cpu" and args.dtype == "float32" and not args.plain_weights:
        model.prepare_for_inference("float32")
    return (BlipForImagesAndText.from_madtp(model) if task == "nlvr2" else dense), model


def make_inputs(task: str, config, batch_size: int, args, images=photograph_crops, seed: int = 0) -> dict:
    """Return the inputs of a task's forward pass: images, and texts of random words and different lengths.

    Texts are padded on the right; CLIP's are padded to its maximum length.
    """
    text = config.text_config
    generator = torch.Generator().manual_seed(args.seed + seed)
    spread = torch.linspace(-TEXT_SPREAD, TEXT_SPREAD, batch_size) if batch_size > 1 else torch.zeros(1)
    lengths = (TEXT_TOKENS[task] * (1 + spread)).round().long()
    width = text.max_position_embeddings if task == "clip" else int(lengths.max())
    mask = (torch.arange(width) < lengths[:, None]).long()
    words = (text.vocab_size // 20, text.vocab_size // 2)  # excludes special tokens
    ids = torch.randint(*words, mask.shape, generator=generator).where(mask == 1, text.pad_token_id)
    num_images = TASKS[task].num_images
    pixel_values = images(num_images * batch_size, config.vision_config.image_size, args.seed + seed)
    if num_images > 1:
        pixel_values = pixel_values.unflatten(0, (batch_size, num_images))
    inputs = {"pixel_values": pixel_values.to(args.torch_dtype), "input_ids": ids, "attention_mask": mask}
    if task in ("captioning", "clip"):
        ids[:, 0] = text.bos_token_id
    if task == "clip":
        ids.scatter_(1, lengths[:, None] - 1, text.eos_token_id)
    if task == "vqa":
        inputs["decoder_input_ids"] = torch.full((batch_size, 1), text.bos_token_id)
    return {name: value.to(args.device) for name, value in inputs.items()}


def calibrate_reachable(model, batches: list[dict], reductions: list[float]) -> list[list[float]]:
    """Calibrate; return an empty schedule if no reduction is requested or reachable.

    An hour-long benchmark should not fail there.
    """
    if not reductions:
        return []
    try:
        return calibrate(model, batches, reductions)
    except ValueError as error:
        print(f"{model.task}: {error}")
        model.config.pruning_schedule = None
        return []


# What is timed


@torch.no_grad()
def forward(model, inputs):
    return model(**inputs)


@torch.no_grad()
def generate(model, inputs):
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(inputs["pixel_values"], num_beams=NUM_BEAMS, **lengths)


@torch.no_grad()
def encode_texts(model, inputs):
    return model.get_text_features(inputs["input_ids"], inputs["attention_mask"])


def training_step(model, inputs):
    output = model(**inputs)
    output.loss.backward()
    model.zero_grad(set_to_none=True)
    return output


class Run(NamedTuple):
    """A run that a round times; the labels name its row, and setup puts the model into the run's state."""

    labels: dict
    model: nn.Module
    setup: Callable[[], None]


def make_runs(task: str, dense, model, inputs: dict, args, reductions, baselines) -> list[Run]:
    """Return the runs of a round: the dense models, each granularity at each reduction, and each baseline.

    All of ours use `model`'s weights.
    """

    def setup(temperature=0.0, factor=1.0, granularity="instance", method=None):
        def apply():
            model.set_reduction_method(method)
            model.config.pruning_granularity = granularity
            model.set_pruning(temperature=temperature, factor=factor)

        return apply

    runs = [Run({"run": "transformers"}, dense, lambda: None), Run({"run": "off"}, model, setup())]
    for granularity in args.granularities:
        for reduction in reductions:
            threshold = model.config.threshold_for(reduction)
            runs.append(Run({"run": granularity, "asked": reduction}, model, setup(*threshold, granularity)))
    lengths = inputs["attention_mask"].sum(dim=1).cpu()
    answers = decoder_tokens(inputs, task, model.config)
    answers = answers.cpu() if isinstance(answers, torch.Tensor) else answers
    for name in baselines:
        for reduction in args.baseline_reductions:
            schedule, reached = find_schedule(name, model.config, task, reduction, lengths, answers)
            if abs(reached - reduction) > 0.01:
                print(f"{task}: {name} can't reduce FLOPs by {reduction}; the nearest is {reached:.3f}.")
            method = make_method(name, schedule)
            runs.append(Run({"run": name, "asked": reduction}, model, setup(method=method)))
    return runs


MORE_CALLS = {"captioning": (generate,), "clip": (encode_texts,)}


# What is measured


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device, function: Callable) -> tuple[int, object]:
    """Return the peak of allocated bytes while `function` runs, above those allocated before, and its result."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return max(int(allocated.max(initial=0)), 0), result


def reduction_reached(model, inputs: dict, output, call: Callable) -> float:
    """Return the exact reduction of FLOPs of a batch, from the model's token counts, which exclude padding."""
    if call is encode_texts:
        return text_reduction(model.config, output)
    if call is not generate:
        return measure(model, inputs, output).mean().item()

    def flops(count):
        encoder = count(model.config, model.task, output.vision_tokens)
        # With the cache each beam computes each token once, and the image's keys and values once per beam.
        written = count(model.config, model.task, output.vision_tokens, answer_tokens=NEW_TOKENS)
        return encoder + NUM_BEAMS * (written - encoder)

    return (1 - flops(count_flops) / flops(dense_flops)).mean().item()


def text_reduction(config, output) -> float:
    """Return the reduction of the FLOPs of CLIP's text tower alone."""

    def flops(count):
        pair = count(config, "clip", output.vision_tokens, output.text_tokens)
        return pair - count(config, "clip", output.vision_tokens, torch.zeros_like(output.text_tokens))

    return (1 - flops(count_flops) / flops(dense_flops)).mean().item()


def feed_forwards(model) -> list[nn.Module]:
    """Return the feed-forward layers of both encoders, without the decoders'."""
    ends = (("vision_model.", ".mlp"), ("text_encoder.", ".intermediate"), ("text_model.", ".mlp"))
    return [
        module
        for name, module in model.named_modules()
        if any(name.startswith(start) and name.endswith(end) for start, end in ends)
    ]


def inspect(run: Run, call: Callable, inputs: dict) -> tuple[dict, object]:
    """Measure memory, tokens and FLOPs in an untimed pass, which is also the warm-up."""
    computed = []
    run.setup()
    hooks = [
        module.register_forward_pre_hook(lambda module, args: computed.append(args[0].numel() // args[0].shape[-1]))
        for module in feed_forwards(run.model)
    ]
    memory, output = peak_memory(inputs["pixel_values"].device, lambda: call(run.model, inputs))
    for hook in hooks:
        hook.remove()
    row = {**run.labels, "memory_mb": memory / 1e6}
    if run.labels["run"] == "transformers":
        return {**row, "flops_ratio": 1.0}, output
    told = output if call in (forward, training_step) else forward(run.model, inputs)
    branches = {"vision_tokens": told.vision_tokens.flatten(1), "text_tokens": told.text_tokens}
    if call is encode_texts:
        del branches["vision_tokens"]
    branches = {name: tokens for name, tokens in branches.items() if tokens is not None}
    row["flops_ratio"] = 1 / (1 - reduction_reached(run.model, inputs, told, call))
    for name, tokens in branches.items():
        row[name] = [round(mean, 1) for mean in tokens.double().mean(dim=1).tolist()]
    row["computed"] = sum(computed) / sum(int(tokens[1:].sum()) for tokens in branches.values())
    return row, output


def time_runs(runs: list[Run], call: Callable, inputs: dict, rounds: int, description: str) -> list[list[float]]:
    """Return the seconds of each run in each round; each round starts with another run."""
    device = inputs["pixel_values"].device
    seconds = [[] for _ in runs]
    for turn in tqdm(range(rounds), desc=description, leave=False):
        first = turn * len(runs) // rounds
        for index in [*range(first, len(runs)), *range(first)]:
            runs[index].setup()
            synchronize(device)
            started = time.perf_counter()
            call(runs[index].model, inputs)
            synchronize(device)
            seconds[index].append(time.perf_counter() - started)
    return seconds


def check_same_output(task: str, theirs, mine, dtype) -> None:
    """Check that our model with pruning off computes transformers' output; otherwise times are not comparable."""
    theirs, mine = (output[SHARED_OUTPUT[task]].float() for output in (theirs, mine))
    difference = ((theirs - mine).abs().max() / theirs.abs().max()).item()
    if difference > (1e-3 if dtype == torch.float32 else 0.1):
        raise AssertionError(f"{task}: transformers' model and ours differ by {difference:.2g} of the largest output.")


def measure_runs(name: str, task: str, runs: list[Run], call: Callable, inputs: dict, rounds: int, args) -> list[dict]:
    """Return the rows of one task and batch size; the first two runs are `transformers` and `off`."""
    batch_size = len(inputs["pixel_values"])
    description = f"{name}, batches of {batch_size}"
    rows, outputs = [], []
    for run in tqdm(runs, desc=f"{description}: warming up", leave=False):
        row, output = inspect(run, call, inputs)
        rows.append({"task": name, "batch_size": batch_size, "images": "photographs", **row})
        outputs = [*outputs, output][:2]
        del output
    if call is forward:
        check_same_output(task, *outputs, args.torch_dtype)
    del outputs
    seconds = time_runs(runs, call, inputs, rounds, f"{description}: timing")
    for row, times in zip(rows, seconds):
        ratios = [theirs / mine for mine, theirs in zip(times, seconds[0])]
        row["rounds"] = rounds
        row["milliseconds"] = 1000 * statistics.median(times)
        row["time_ratio"] = statistics.median(ratios)
        row["time_quartiles"] = np.percentile(ratios, [25, 75]).tolist()
        row["efficiency"] = row["time_ratio"] / row["flops_ratio"]
        row["memory_ratio"] = row["memory_mb"] / rows[0]["memory_mb"]
    return rows


# Rows of the tasks and of training


def rounds_for(batch_size: int, index: int, args) -> int:
    if args.rounds:
        return args.rounds[min(index, len(args.rounds) - 1)]
    if args.device.type == "cuda":
        return 20
    return 15 if batch_size < 4 else 5 if batch_size < 16 else 3


def calibration_batches(task: str, config, args) -> list[dict]:
    """Return crops and texts that occur in no timed batch."""
    starts = range(0, args.calibration_samples, CALIBRATION_BATCH)
    sizes = [min(CALIBRATION_BATCH, args.calibration_samples - start) for start in starts]
    return [make_inputs(task, config, size, args, seed=1000 + index) for index, size in enumerate(sizes)]


def time_task(row_name: str, args, save: Callable) -> None:
    dense, model = make_models(row_name, args)
    task = model.task
    batches = [] if args.calibrate_on_batch else calibration_batches(task, model.config, args)
    schedule = calibrate_reachable(model, batches, args.reductions) if batches else []
    for index, batch_size in enumerate(args.batch_sizes):
        inputs = make_inputs(task, model.config, batch_size, args)
        if args.calibrate_on_batch:
            schedule = calibrate_reachable(model, [inputs], args.reductions)
        reductions = [entry[0] for entry in schedule]
        rounds = rounds_for(batch_size, index, args)
        for call in (forward, *MORE_CALLS.get(model.task, ())):
            name = row_name + {generate: "-generate", encode_texts: "-text"}.get(call, "")
            baselines = [] if call is encode_texts else args.baselines  # baselines don't reduce texts
            runs = make_runs(task, dense, model, inputs, args, reductions, baselines)
            rows = measure_runs(name, task, runs, call, inputs, rounds, args)
            if batch_size == max(args.batch_sizes) and call is forward and batch_size > 1:
                mixed = make_inputs(task, model.config, batch_size, args, images=mixed_images)
                for run in runs[2:]:
                    if run.labels["run"] in args.granularities:
                        row, _ = inspect(run, call, mixed)
                        rows.append({"task": name, "batch_size": batch_size, "images": "mixed", **row})
            model.set_reduction_method(None)  # a baseline may have set one
            save(name, batch_size, rows, schedule)


def time_training(args, save: Callable) -> None:
    """Time a forward and backward pass of question answering, without the optimizer step."""
    dense, model = make_models("vqa", args)
    inputs = make_inputs("vqa", model.config, args.training_batch_size, args)
    batches = [inputs] if args.calibrate_on_batch else calibration_batches("vqa", model.config, args)
    schedule = calibrate_reachable(model, batches, [args.training_reduction])
    ids = inputs["input_ids"][:, :ANSWER_TOKENS].clone()
    ids[:, 0] = inputs.pop("decoder_input_ids")[:, 0]
    inputs["labels"] = ids
    runs = make_runs("vqa", dense.train(), model.train(), inputs, args, [pair[0] for pair in schedule], baselines=[])
    rounds = rounds_for(args.training_batch_size, 0, args)
    rows = measure_runs("vqa-training", "vqa", runs, training_step, inputs, rounds, args)
    save("vqa-training", args.training_batch_size, rows, schedule)


# Results


def machine(args) -> dict:
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu",
        "dtype": args.dtype,
        "size": args.size,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def print_table(title: str, rows: list[dict]) -> None:
    table = Table(title=title)
    columns = (
        "run",
        "asked",
        "ms",
        "time ratio",
        "quartiles",
        "FLOPs ratio",
        "efficiency",
        "memory ratio",
        "computed",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")

    def number(row, key, form=".3f"):
        return format(row[key], form) if row.get(key) is not None else ""

    for row in rows:
        mixed = row["images"] == "mixed"
        table.add_row(
            row["run"] + (", mixed" if mixed else ""),
            number(row, "asked", ".2f"),
            number(row, "milliseconds", ".1f"),
            number(row, "time_ratio"),
            "" if mixed else "{:.3f}-{:.3f}".format(*row["time_quartiles"]),
            number(row, "flops_ratio"),
            number(row, "efficiency", ".2f"),
            number(row, "memory_ratio"),
            number(row, "computed"),
        )
    Console(width=120).print(table)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    blip_tasks = [task for task in MODELS if MODELS[task] is not CLIPModel]
    parser.add_argument("--tasks", nargs="*", choices=MODELS, default=blip_tasks, help="default: BLIP's four")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    parser.add_argument(
        "--reductions",
        type=float,
        nargs="*",
        default=[0.3, 0.5, 0.6, 0.7, 0.8],
        help="of FLOPs, that pruned runs are calibrated to; default: 0.3 0.5 0.6 0.7 0.8",
    )
    parser.add_argument("--granularities", nargs="+", choices=("instance", "batch"), default=["instance", "batch"])
    parser.add_argument("--baselines", nargs="*", choices=list(FIXED), default=["tome", "evit"])
    parser.add_argument("--baseline_reductions", type=float, nargs="+", default=[0.5, 0.8], help="default: 0.5 0.8")
    parser.add_argument(
        "--rounds",
        type=int,
        nargs="+",
        help=(
            "how often to time everything, one number or one a batch size; default on a CPU: 15 for batches under 4, 5"
            " under 16, else 3"
        ),
    )
    parser.add_argument("--calibration_samples", type=int, default=16, help="default: 16")
    parser.add_argument(
        "--calibrate_on_batch",
        action="store_true",
        help=(
            "on the very batch that is timed, whose reduction then is what is asked; else on crops and texts of their"
            " own"
        ),
    )
    parser.add_argument(
        "--plain_weights", action="store_true", help="don't lay out weights for the CPU, see prepare_for_inference"
    )
    parser.add_argument("--training_step", action="store_true", help="also time a training step of question answering")
    parser.add_argument("--training_batch_size", type=int, default=16, help="default: 16")
    parser.add_argument("--training_reduction", type=float, default=0.5, help="default: 0.5")
    parser.add_argument("--size", choices=SIZES, default="base", help="others than base: only to see whether it runs")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        help="a JSON file, written after each task and batch size; rows that it has of others are kept",
    )
    args = parser.parse_args()
    args.torch_dtype = getattr(torch, args.dtype)
    return args


def main():
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)

    result = {"settings": {}, "machine": machine(args), "schedules": {}, "rows": []}
    if args.output and args.output.exists():
        before = json.loads(args.output.read_text())
        if before["machine"] != result["machine"]:
            sys.exit(
                f"{args.output} was measured on {before['machine']}, this is {result['machine']}: their rows don't"
                " belong in one file."
                " Give another --output."
            )
        result = before
    hidden = ("output", "torch_dtype")
    result["settings"] = {
        name: str(value) if name == "device" else value for name, value in vars(args).items() if name not in hidden
    }

    def save(name, batch_size, rows, schedule):
        others = [row for row in result["rows"] if (row["task"], row["batch_size"]) != (name, batch_size)]
        result["rows"] = others + rows
        result["schedules"][name] = schedule
        print_table(f"{name}, batches of {batch_size}", rows)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    for task in args.tasks:
        time_task(task, args, save)
    if args.training_step:
        time_training(args, save)


if __name__ == "__main__":
    main()
