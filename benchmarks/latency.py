"""How much faster a pruned BLIP-base is on the clock: one question about one image, against transformers' BLIP, interleaved in one run.

python benchmarks/latency.py --output benchmarks/results/latency_cpu.json
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import BlipConfig, BlipForQuestionAnswering

from madtp_hf import MadtpBlipForQuestionAnswering, calibrate
from madtp_hf.calibration import measure_reduction


def make_inputs(batch_size: int, config, generator) -> dict[str, torch.Tensor]:
    size, words = config.vision_config.image_size, 12
    start = torch.full((batch_size, 1), config.text_config.bos_token_id)
    return {
        "pixel_values": torch.randn(batch_size, 3, size, size, generator=generator),
        "input_ids": torch.randint(1000, 20000, (batch_size, words), generator=generator),
        "attention_mask": torch.ones(batch_size, words, dtype=torch.long),
        "decoder_input_ids": start,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    config = BlipConfig(
        text_config={"num_attention_heads": 12},
        # transformers' own default for the vision tower, 1e-10, makes all patches the same.
        vision_config={"image_size": 384, "initializer_range": 0.02},
    )
    dense = BlipForQuestionAnswering(config).eval()
    model = MadtpBlipForQuestionAnswering.from_blip(dense)
    calibrate(model, [make_inputs(1, config, generator) for _ in range(2)], args.reductions)

    inputs = make_inputs(args.batch_size, config, generator)
    runs = {"transformers": None, "off": 0.0, **{str(r): r for r in args.reductions}}
    seconds = {name: [] for name in runs}
    with torch.no_grad():
        for turn in tqdm(range(args.rounds + 2), desc="timing", leave=False):
            for name, reduction in runs.items():
                if reduction is not None:
                    model.set_pruning(reduction=reduction)
                started = time.perf_counter()
                (dense if reduction is None else model)(**inputs)
                if turn >= 2:  # the first two warm up
                    seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, reduction in runs.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds["transformers"], seconds[name])]
        row = {
            "run": name,
            "milliseconds": 1000 * statistics.median(seconds[name]),
            "times_faster": statistics.median(ratios),
            "quartiles": [statistics.quantiles(ratios)[0], statistics.quantiles(ratios)[2]],
        }
        if reduction:
            model.set_pruning(reduction=reduction)
            row["reduction_reached"] = measure_reduction(model, [inputs], model.config.pruning_temperature)
        rows.append(row)
        print(
            f"{name:>14}  {row['milliseconds']:8.1f} ms  {row['times_faster']:.2f}x"
            f" ({row['quartiles'][0]:.2f}-{row['quartiles'][1]:.2f})  reduction {row.get('reduction_reached', 0):.3f}"
        )
    if args.output:
        machine = {
            "processor": next(
                (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
                platform.processor(),
            ),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        args.output.write_text(json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
