"""Measure the cost of scoring and pruning in a pruned forward pass, as a share of the pass.

    python benchmarks/overhead.py --output benchmarks/results/overhead_cpu.json

It includes the alignment scores, importance, threshold, selection and merging. For the attention that also returns
scores, it includes the extra time over fused attention of the same queries, keys and values, which runs beside it and
is subtracted from the pass.
"""

import contextlib
import itertools
import statistics
import time
from unittest import mock

from random_models import (
    MODELS,
    add_arguments,
    calibrate_reachable,
    calibration_batches,
    make_inputs,
    make_models,
    read_setup,
)
from reporting import environment, make_parser, print_table, settings_of, write_json
from speed import forward
from timing import timed

from madtp_hf.modeling import encoder
from madtp_hf.modeling.attention import attend


# The timed functions, patched where the engine looks them up.
STEPS = {
    "alignment scores": (encoder.MadtpReduction, "read_input"),
    "importance": (encoder, "token_importance"),
    "threshold": (encoder, "importance_threshold"),
    "selection": (encoder, "select_tokens"),
    "weights": (encoder, "merge_weights"),
    "new rows": (encoder, "reduce"),
}


class Clock(contextlib.ExitStack):
    """Measure the seconds of each step; while active, timed wrappers replace the engine's functions."""

    def __enter__(self):
        self.seconds = dict.fromkeys((*STEPS, "scored attention", "fused attention"), 0.0)
        for name, (owner, attribute) in STEPS.items():
            timed = self.timed(name, getattr(owner, attribute))
            self.enter_context(mock.patch.object(owner, attribute, timed))
        scored = self.timed("scored attention", encoder.attend_with_evidence)
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

        self.enter_context(mock.patch.object(encoder, "attend_with_evidence", both))
        return super().__enter__()

    def timed(self, name, function):
        def call(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - started
            return result

        return call


def measure_round(model, inputs: dict) -> dict[str, float]:
    """Time one pass; return the share of each step in percent, without the fused attention that runs beside it."""
    with Clock() as clock:
        whole = timed(lambda: forward(model, inputs))[0]
    fused = clock.seconds.pop("fused attention")
    clock.seconds["scored attention"] -= fused
    shares = {name: 100 * spent / (whole - fused) for name, spent in clock.seconds.items()}
    return {**shares, "all": sum(shares.values())}


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--task", choices=MODELS, default="vqa")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calibration_samples", type=int, default=8)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    setup = read_setup(args, prepack=True)
    _, model = make_models(args.task, setup)
    batches = calibration_batches(model.task, model.config, args.calibration_samples, setup)
    rows = []
    for reduction, *_ in calibrate_reachable(model, batches, args.reductions):
        model.set_pruning(reduction=reduction)
        for batch_size in args.batch_sizes:
            inputs = make_inputs(model.task, model.config, batch_size, setup)
            forward(model, inputs)
            rounds = [measure_round(model, inputs) for _ in range(args.rounds)]
            medians = {name: round(statistics.median(shares[name] for shares in rounds), 2) for name in rounds[0]}
            rows.append({"batch_size": batch_size, "reduction": reduction, "percent": medians})
    rows.sort(key=lambda row: row["batch_size"])
    columns = ["step", *(f"{row['batch_size']}, {row['reduction']:.2f}" for row in rows)]
    lines = [[name, *(row["percent"][name] for row in rows)] for name in (rows[0]["percent"] if rows else ())]
    print_table("percent of a pass, by batch size and reduction", columns, lines)
    write_json(args.output, {"settings": settings_of(args), **environment(), "rows": rows})


if __name__ == "__main__":
    main()
