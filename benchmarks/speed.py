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
    python benchmarks/speed.py --tasks vqa --precisions bfloat16 int8 --layers 2 --calibrate_on_batch \\
        --output benchmarks/results/speed_precisions_cpu.json
    python benchmarks/speed.py --size tiny --rounds 2 --tasks vqa --batch_sizes 4   # a quick trial

Runs: `transformers`, its BLIP (for NLVR2, which it lacks, a reference built from its parts); `off`, ours without
pruning; `instance` and `batch`, pruned in that granularity, also in another precision or in the first layers alone;
`tome`, `evit` and `random`, see methods.py. Captioning is timed twice, as a teacher-forced forward pass
(`captioning`) and as generation (`captioning-generate`); retrieval is the pass that matches an image and a text.
`clip` is ViT-B/16 at 224 pixels and `clip-large` ViT-L/14 at 336; texts are padded to CLIP's 77 tokens, a common
use of its tokenizer, and are timed alone as well (`clip-text`).

Columns: `times faster` and its quartiles, transformers' time over the run's; `FLOPs ratio`, likewise and exact for the
timed batch; `efficiency`, times faster over FLOPs ratio, 1 if the speed-up equals the FLOPs reduction; `memory
ratio`, the run's peak memory of activations over transformers'; `computed`, tokens that the encoders' feed-forward
layers computed over those that had to be computed. Token counts per layer are in the file. `mixed` rows, at the
largest batch size, are not timed: they show how images of different kinds in one batch affect the token counts.
"""

import copy
import functools
from collections.abc import Callable

import torch
from calibrating import calibrate_all
from photographs import mixed_images
from random_models import (
    MODELS,
    Setup,
    add_arguments,
    add_labels,
    calibration_batches,
    make_inputs,
    make_models,
    read_setup,
)
from reporting import Rows, environment, make_parser, print_table, settings_of, show
from timing import Run, compare, peak_memory, time_runs
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPModel

from madtp_hf import count_flops
from madtp_hf.budgets.flops import dense_flops
from madtp_hf.budgets.passes import measure


NUM_BEAMS, NEW_TOKENS = 3, 10  # for caption generation
# The output that transformers' model and ours must agree on with pruning off.
SHARED_OUTPUT = {
    "vqa": "image_embeds",
    "nlvr2": "logits",
    "captioning": "logits",
    "retrieval": "itm_score",
    "clip": "logits_per_image",
}


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
    return model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output


def training_step(model, inputs):
    output = model(**inputs)
    output.loss.backward()
    model.zero_grad(set_to_none=True)
    return output


BASELINES = ("madtp_merge", "tome", "evit", "random", "class_attention")
MORE_CALLS = {"captioning": {"-generate": generate}, "clip": {"-text": encode_texts}}


def make_runs(task: str, dense, model, inputs: dict, call: Callable, args, reductions, baselines) -> list[Run]:
    """Return the runs of a round: the dense models, each granularity at each reduction, and each baseline.

    All of ours have `model`'s weights.
    """

    def run(labels, setting=None, granularity="instance", method="madtp", model=model):
        def setup():
            model.config.pruning_granularity, model.config.pruning_method = granularity, method
            model.config.pruning_setting = setting

        return Run(labels, functools.partial(call, model, inputs), setup, model)

    runs = [Run({"run": "transformers"}, functools.partial(call, dense, inputs), model=dense), run({"run": "off"})]
    for granularity in args.granularities:
        for reduction in reductions:
            runs.append(run({"run": granularity, "asked": reduction}, model.setting_for(reduction), granularity))
    schedule = model.config.pruning_schedule
    for name, other in other_models(model, args).items():
        other.config.pruning_layers = args.layers if name.startswith("first") else None
        calibrated = calibrate_all(other, [inputs], args.reductions) if name.startswith("first") else reductions
        runs.append(run({"run": f"off, {name}"}, model=other))
        for reduction in calibrated:
            labels = {"run": f"instance, {name}", "asked": reduction}
            runs.append(run(labels, other.setting_for(reduction), model=other))
    if "bfloat16" in args.precisions:
        half = copy.deepcopy(dense).to(torch.bfloat16)
        halved = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
        runs.append(Run({"run": "transformers, bfloat16"}, functools.partial(call, half, halved), model=half))
    for name in baselines:
        model.config.pruning_schedule = None  # each method has its own
        model.set_pruning_method(name)
        for reduction in calibrate_all(model, [inputs], args.baseline_reductions):
            runs.append(run({"run": name, "asked": reduction}, model.setting_for(reduction), method=name))
    model.config.pruning_schedule = None
    model.set_pruning_method("madtp")
    model.config.pruning_schedule = schedule
    return runs


def other_models(model, args) -> dict:
    """Return copies of a model by name: in other precisions, and one that prunes in the first layers alone."""
    others = {name: copy.deepcopy(model).prepare_for_inference(name) for name in args.precisions}
    if args.layers:
        others[f"first {args.layers} layers"] = copy.deepcopy(model).prepare_for_inference("float32")
    return others


# What is measured


def reduction_reached(model, inputs: dict, output, call: Callable) -> float:
    """Return the exact reduction of FLOPs of a batch, from the model's token counts, which exclude padding."""
    config, task, vision = model.config, model.task, output.vision_tokens
    if call is encode_texts:

        def flops(count):  # CLIP's text tower alone
            pair = count(config, task, vision, output.text_tokens)
            return pair - count(config, task, vision, torch.zeros_like(output.text_tokens))
    elif call is generate:

        def flops(count):
            encoder = count(config, task, vision)
            # With the cache each beam computes each token once, and the image's keys and values once per beam.
            return encoder + NUM_BEAMS * (count(config, task, vision, answer_tokens=NEW_TOKENS) - encoder)
    else:
        return measure(model, inputs, output).mean().item()
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
    if run.labels["run"].startswith("transformers"):
        return {**row, "flops_ratio": 1.0}, output
    told = output if call in (forward, training_step) else forward(run.model, inputs)
    row["flops_ratio"] = 1 / (1 - reduction_reached(run.model, inputs, told, call))
    branches = {"vision_tokens": told.vision_tokens.flatten(1), "text_tokens": told.text_tokens}
    if call is encode_texts:
        del branches["vision_tokens"]
    branches = {name: tokens for name, tokens in branches.items() if tokens is not None}
    for name, tokens in branches.items():
        row[name] = [round(mean, 1) for mean in tokens.double().mean(dim=1).tolist()]
    row["computed"] = sum(computed) / sum(int(tokens[1:].sum()) for tokens in branches.values())
    return row, output


def check_same_output(task: str, theirs, mine, dtype) -> None:
    """Check that our model with pruning off computes transformers' output; otherwise times are not comparable."""
    theirs, mine = (output[SHARED_OUTPUT[task]].float() for output in (theirs, mine))
    difference = ((theirs - mine).abs().max() / theirs.abs().max()).item()
    if difference > (1e-3 if dtype == torch.float32 else 0.1):
        raise AssertionError(f"{task}: transformers' model and ours differ by {difference:.2g} of the largest output.")


def measure_runs(name: str, runs: list[Run], call: Callable, inputs: dict, rounds: int, dtype) -> list[dict]:
    """Return the rows of one task and batch size; the first two runs are `transformers` and `off`."""
    batch_size, device = len(inputs["pixel_values"]), inputs["pixel_values"].device
    description = f"{name}, batches of {batch_size}"
    rows, outputs = [], []
    for run in tqdm(runs, desc=f"{description}: warming up", leave=False):
        row, output = inspect(run, call, inputs)
        rows.append({"task": name, "batch_size": batch_size, "images": "photographs", **row})
        outputs = [*outputs, output][:2]
        del output
    if call is forward:
        check_same_output(runs[1].model.task, *outputs, dtype)
    del outputs
    seconds = time_runs(runs, rounds, device, f"{description}: timing")
    for row, times in zip(rows, seconds):
        row |= compare(times, seconds[0])
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


def time_task(row_name: str, args, setup: Setup, save: Callable) -> None:
    dense, model = make_models(row_name, setup)
    task = model.task
    reductions = []
    if not args.calibrate_on_batch:
        batches = calibration_batches(task, model.config, args.calibration_samples, setup)
        reductions = calibrate_all(model, batches, args.reductions)
    for index, batch_size in enumerate(args.batch_sizes):
        inputs = make_inputs(task, model.config, batch_size, setup)
        if args.calibrate_on_batch:
            reductions = calibrate_all(model, [inputs], args.reductions)
        rounds = rounds_for(batch_size, index, args)
        for ending, call in {"": forward, **MORE_CALLS.get(task, {})}.items():
            baselines = [] if call is encode_texts else args.baselines  # baselines don't reduce texts
            runs = make_runs(task, dense, model, inputs, call, args, reductions, baselines)
            rows = measure_runs(row_name + ending, runs, call, inputs, rounds, setup.dtype)
            if batch_size == max(args.batch_sizes) and call is forward and batch_size > 1:
                mixed = make_inputs(task, model.config, batch_size, setup, images=mixed_images)
                for run in runs[2:]:
                    if run.labels["run"] in args.granularities:
                        row, _ = inspect(run, call, mixed)
                        rows.append({"task": row_name, "batch_size": batch_size, "images": "mixed", **row})
            model.config.pruning_setting, model.config.pruning_method = None, "madtp"  # a baseline may have set one
            save(row_name + ending, batch_size, rows, model.config.pruning_schedule)


def time_training(args, setup: Setup, save: Callable) -> None:
    """Time a forward and backward pass of question answering, without the optimizer step."""
    dense, model = make_models("vqa", setup)
    inputs = make_inputs("vqa", model.config, args.training_batch_size, setup)
    batches = [inputs]
    if not args.calibrate_on_batch:
        batches = calibration_batches("vqa", model.config, args.calibration_samples, setup)
    reductions, inputs = calibrate_all(model, batches, [args.training_reduction]), add_labels(inputs)
    runs = make_runs("vqa", dense.train(), model.train(), inputs, training_step, args, reductions, baselines=[])
    rounds = rounds_for(args.training_batch_size, 0, args)
    rows = measure_runs("vqa-training", runs, training_step, inputs, rounds, setup.dtype)
    save("vqa-training", args.training_batch_size, rows, model.config.pruning_schedule)


# Results


def print_rows(title: str, rows: list[dict]) -> None:
    forms = {"asked": ".2f", "milliseconds": ".1f", "time_ratio": ".3f", "quartiles": "", "flops_ratio": ".3f"}
    forms |= {"efficiency": ".2f", "memory_ratio": ".3f", "computed": ".3f"}
    lines = []
    for row in rows:
        quartiles = "{:.3f}-{:.3f}".format(*row["time_quartiles"]) if "time_quartiles" in row else None
        name = row["run"] + (", mixed" if row["images"] == "mixed" else "")
        lines.append([name, *(show({**row, "quartiles": quartiles}.get(key), form) for key, form in forms.items())])
    names = {"time_ratio": "times faster"}
    print_table(title, ["run", *(names.get(name, name.replace("_", " ")) for name in forms)], lines)


def parse_arguments(arguments=None):
    parser = make_parser(__doc__)
    blip_tasks = [task for task in MODELS if MODELS[task] is not CLIPModel]
    parser.add_argument("--tasks", nargs="*", choices=MODELS, default=blip_tasks, help="Default: BLIP's four.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="Default: 1 8 32.")
    parser.add_argument(
        "--reductions",
        type=float,
        nargs="*",
        default=[0.3, 0.5, 0.6, 0.7, 0.8],
        help="FLOPs reductions to calibrate to; default: 0.3 0.5 0.6 0.7 0.8.",
    )
    parser.add_argument("--granularities", nargs="+", choices=("instance", "batch"), default=["instance", "batch"])
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=["tome", "evit"])
    parser.add_argument(
        "--baseline_reductions",
        type=float,
        nargs="+",
        default=[0.5, 0.8],
        help="Reductions of the baselines; default: 0.5 0.8.",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        nargs="+",
        help="Rounds of timing, one number or one per batch size; default on a CPU: 15 for batches under"
        " 4, 5 under 16, else 3.",
    )
    parser.add_argument("--calibration_samples", type=int, default=16, help="Default: 16.")
    parser.add_argument(
        "--calibrate_on_batch",
        action="store_true",
        help="Calibrate on the timed batch, which then reaches the reductions exactly; by default on other data.",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("bfloat16", "int8"),
        default=[],
        help="Also time our model in these precisions and, with bfloat16, transformers' in bfloat16.",
    )
    parser.add_argument("--layers", type=int, help="Also time our model pruning only in this many first layers.")
    parser.add_argument("--plain_weights", action="store_true", help="Don't prepack weights for the CPU.")
    parser.add_argument(
        "--training_step", action="store_true", help="Also time a training step of question answering."
    )
    parser.add_argument("--training_batch_size", type=int, default=16, help="Default: 16.")
    parser.add_argument("--training_reduction", type=float, default=0.5, help="Default: 0.5.")
    add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    setup = read_setup(args, prepack=not args.plain_weights)
    header = {"settings": settings_of(args), **environment(args.device), "schedules": {}}
    header["machine"] |= {"size": args.size, "dtype": args.dtype}
    results = Rows(args.output, header, ("task", "batch_size", "run", "asked", "images"), ("machine", "versions"))

    def save(name, batch_size, rows, schedule):
        print_rows(f"{name}, batches of {batch_size}", rows)
        results.forget([key for key in results.rows if key[:2] == (name, batch_size)])
        results.add(*rows, schedules={**results.header["schedules"], name: schedule})

    for task in args.tasks:
        time_task(task, args, setup, save)
    if args.training_step:
        time_training(args, setup, save)


if __name__ == "__main__":
    main()
