"""Test whether calibration reaches any budget on any model, on random models of all tasks.

The models have from 3 to 12 layers, widths from 32 to 128, and default settings.

    python benchmarks/any_budget.py --output benchmarks/results/any_budget.json

Every model is calibrated for every reduction on the same random images and texts, then measured on them once more. A
reduction that is missing from a model's schedule is larger than the model can reach; the file keeps the warning that
names it.
"""

import time
import warnings

import torch
from reporting import environment, make_parser, write_json

from madtp_hf import MadtpBlipConfig, calibrate
from madtp_hf.budgets.calibration import measure_reduction
from madtp_hf.tasks import TASKS


BLIP_TASKS = [task for task in TASKS if TASKS[task].family.name == "BLIP"]
SHAPES = ((3, 32), (4, 64), (6, 96), (9, 48), (12, 128))  # layers of each encoder, width
IMAGE_SIZE, PATCH_SIZE, VOCABULARY, LONGEST = 64, 8, 100, 16


def random_model(task: str, num_layers: int, width: int, seed: int):
    """Build a model of the task with random weights and alignment tokens; everything but its size is the default."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
    }
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "bos_token_id": 98, "sep_token_id": 3}
    text |= {"eos_token_id": 3, "pad_token_id": 0}
    config = MadtpBlipConfig(
        text_config={**sizes, **text},
        vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        image_text_hidden_size=width,
    )
    return TASKS[task].model_class(config).eval()


def random_batches(task: str, num_samples: int, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return images of noise, each with its own amplitude, and texts of random words and lengths."""
    generator, batches = torch.Generator().manual_seed(seed), []
    images = (2,) if TASKS[task].num_images == 2 else ()
    for _ in range(num_samples // batch_size):
        pixels = torch.randn(batch_size, *images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        strength = 0.3 + 1.7 * torch.rand(batch_size, *(1 for _ in pixels.shape[1:]), generator=generator)
        batch = {"pixel_values": pixels * strength}
        if TASKS[task].text_encoder:
            lengths = torch.randint(5, LONGEST + 1, (batch_size, 1), generator=generator)
            mask = torch.arange(LONGEST) < lengths
            words = torch.randint(4, VOCABULARY - 2, (batch_size, LONGEST), generator=generator)
            batch |= {"input_ids": words.where(mask, 0), "attention_mask": mask.long()}
        batches.append(batch)
    return batches


def reach(model, batches, reductions: list[float]) -> dict:
    """Calibrate and measure a model: {"reached": {asked: measured}, "schedule", "told": calibration's warnings}."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            schedule = calibrate(model, batches, reductions)
        except ValueError as error:  # no reduction was reached
            return {"reached": {}, "schedule": [], "told": [str(error)]}
    reached = {
        entry["reduction"]: measure_reduction(model, batches, **model.setting_for(entry["reduction"]))
        for entry in schedule
    }
    return {"reached": reached, "schedule": schedule, "told": [str(warning.message) for warning in told]}


def main(arguments=None):
    parser = make_parser(__doc__, "any_budget.json")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.05, 0.1, 0.3, 0.5])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tasks", nargs="+", choices=BLIP_TASKS, default=BLIP_TASKS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for number, (task, (num_layers, width)) in enumerate((task, shape) for task in args.tasks for shape in SHAPES):
        model = random_model(task, num_layers, width, seed=number)
        started = time.perf_counter()
        row = {"task": task, "layers": num_layers, "width": width, "seed": number}
        row |= reach(model, random_batches(task, args.samples, min(32, args.samples), seed=number), args.reductions)
        missing = sorted(set(args.reductions) - set(row["reached"]))
        worst = max((abs(asked - got) for asked, got in row["reached"].items()), default=0.0)
        rows.append(row | {"missing": missing, "worst": worst, "seconds": time.perf_counter() - started})
        print(
            f"{task} {num_layers} {width}: missing {missing}, worst {worst:.4f}", *row["told"], sep="\n   ", flush=True
        )
        write_json(args.output, {"samples": args.samples, **environment(), "models": rows})


if __name__ == "__main__":
    main()
