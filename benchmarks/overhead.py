"""Measure the cost of scoring and pruning in a pruned forward pass, as a share of the pass.

    python benchmarks/overhead.py --output benchmarks/results/overhead_cpu.json

It includes the alignment scores, importance, threshold, selection and merging. For the attention that also returns
scores, it includes the extra time over fused attention of the same queries, keys and values, which runs beside it and
is subtracted from the pass.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from speed import MODELS, SIZES, calibrate_reachable, calibration_batches, forward, machine, make_inputs, make_models

from madtp_hf.modeling import encoder, method_madtp, pruning_method
from madtp_hf.modeling.attention import attend


# The timed functions, patched where the engine looks them up.
STEPS = {
    "alignment scores": (method_madtp.MadtpMethod, "read_input"),
    "importance": (method_madtp, "token_importance"),
    "threshold": (method_madtp, "importance_threshold"),
    "selection": (method_madtp, "select_tokens"),
    "weights": (method_madtp, "merge_weights"),
    "new rows": (encoder, "repack"),
}


class Clock(contextlib.ExitStack):
    """Measure the seconds of each step; while active, timed wrappers replace the engine's functions."""

    def __enter__(self):
        self.seconds = dict.fromkeys((*STEPS, "scored attention", "fused attention"), 0.0)
        for name, (owner, attribute) in STEPS.items():
            timed = self.timed(name, getattr(owner, attribute))
            self.enter_context(mock.patch.object(owner, attribute, timed))
        scored = self.timed("scored attention", pruning_method.attend_with_statistics)
        fused = self.timed("fused attention", attend)
        fused_first = itertools.cycle((True, False))

        def both(query_key_value, part, *options):
            query, key, value = part.pad(query_key_value).flatten(0, 1).unbind(1)
            # Alternate the order, so that neither always finds the other's data in cache.
            first = next(fused_first)
            if first:
                fused(None, "sdpa", query, key, value, part)
            result = scored(query_key_value, part, *options)
            if not first:
                fused(None, "sdpa", query, key, value, part)
            return result

        self.enter_context(mock.patch.object(pruning_method, "attend_with_statistics", both))
        return super().__enter__()

    def timed(self, name, function):
        def call(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - started
            return result

        return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=MODELS, default="vqa")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calibration_samples", type=int, default=8)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.device, args.dtype, args.torch_dtype, args.plain_weights = (
        torch.device("cpu"),
        "float32",
        torch.float32,
        False,
    )

    _, model = make_models(args.task, args)
    schedule = calibrate_reachable(model, calibration_batches(args.task, model.config, args), args.reductions)
    rows = []
    for batch_size in args.batch_sizes:
        inputs = make_inputs(args.task, model.config, batch_size, args)
        for reduction in (entry["reduction"] for entry in schedule):
            model.set_pruning(reduction=reduction)
            forward(model, inputs)
            rounds = []
            for _ in range(args.rounds):
                with Clock() as clock:
                    started = time.perf_counter()
                    forward(model, inputs)
                    whole = time.perf_counter() - started
                seconds = clock.seconds
                fused = seconds.pop("fused attention")
                seconds["scored attention"] -= fused
                shares = {name: 100 * spent / (whole - fused) for name, spent in seconds.items()}
                rounds.append({**shares, "all": sum(shares.values())})
            medians = {name: round(statistics.median(shares[name] for shares in rounds), 2) for name in rounds[0]}
            rows.append({"batch_size": batch_size, "reduction": reduction, "percent": medians})
            print(f"batch {batch_size}, reduction {reduction}: " + ", ".join(f"{k} {v} %" for k, v in medians.items()))
    if args.output:
        settings = {"task": args.task, "rounds": args.rounds, "calibration_samples": args.calibration_samples}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"settings": settings, "machine": machine(args), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
