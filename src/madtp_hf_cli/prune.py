"""`madtp-hf prune`: turn a dense checkpoint into a calibrated, pruned one, without training."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .common import check_out, print_table, warnings_as_messages, written_in_one_step


SCRIPTS = {"vqa": "run_vqa", "captioning": "run_captioning", "nlvr2": "run_nlvr2", "retrieval": "run_retrieval"}


def _notes(source: str, rows: list[dict], samples: int, fitted: bool) -> str:
    """Return what the model card says about pruning without training."""
    start = "fitted to the same samples" if fitted else "the checkpoint's own, or random"
    lines = ["| reduction asked | reached | GFLOPs of a sample |", "|---:|---:|---:|"]
    lines += [f"| {row['reduction asked']:g} | {row['reached']:.1%} | {row['GFLOPs']:.4g} |" for row in rows]
    return f"""Pruned from `{source}` by `madtp-hf prune`, without training: the weights are the dense model's,
thresholds were calibrated on {samples} samples without labels, and the alignment tokens are {start}. No accuracy
was measured: measure it before you rely on a budget.

""" + "\n".join(lines)


def prune(
    model: options.Model,
    out: options.OutFolder,
    data: options.Data,
    reductions: Annotated[
        list[float] | None,
        typer.Option(metavar="R ...", help="FLOPs to save; it loads at the first. Default: 0.5 0.3 0.7."),
    ] = None,
    text: options.Texts = None,
    image_dir: options.ImageDir = None,
    samples: options.Samples = 200,
    seed: options.Seed = 0,
    task: options.Task = None,
    alignment: Annotated[
        str | None,
        typer.Option(metavar="fit|keep", help="Fit alignment tokens to the data; by default new ones."),
    ] = None,
    batch_size: options.BatchSize = 8,
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Prune a BLIP or CLIP without training: calibrate thresholds on a few unlabelled images.

    To recover what pruning costs, fine-tune: examples/run_*.py.

    Example: madtp-hf prune Salesforce/blip-vqa-base out --data photos --question "what is it?"
    """
    out = out.resolve()
    check_out(out, model, force)
    if alignment not in (None, "fit", "keep"):
        raise ValueError(f"--alignment {alignment}: expected fit or keep.")
    from madtp_hf import calibrate, init_alignment_from
    from madtp_hf.budgets.calibration import read_reductions
    from madtp_hf.budgets.evaluation import evaluate_budgets
    from madtp_hf.budgets.passes import encode
    from madtp_hf.checkpoints.card import write_model_card
    from madtp_hf.checkpoints.load import load_model, make_batches
    from madtp_hf.data.rows import load_rows
    from madtp_hf.tasks import TASKS

    wanted = reductions or [0.5, 0.3, 0.7]
    source = model
    read_reductions(wanted)  # fail before minutes of reading
    model, processor, is_dense = load_model(source, task, device)
    entry = TASKS[model.task]
    rows = load_rows(entry, data, text or (), image_dir, samples=samples, seed=seed)
    batches = make_batches(model, processor, rows, batch_size)
    fitted = is_dense if alignment is None else alignment == "fit"
    if fitted:
        init_alignment_from(model, batches)
    with warnings_as_messages():
        schedule = calibrate(model, batches, wanted)

    def forward(batch):
        encode(model, batch)
        return [None] * len(batch["pixel_values"])

    reached = [entry[0] for entry in schedule]
    results = evaluate_budgets(model, batches, [0.0, *reached], forward)
    table = [
        {"reduction asked": r.reduction_asked, "reached": r.reduction_reached, "GFLOPs": r.gflops} for r in results
    ]
    model.set_pruning(reduction=next((r for r in wanted if r in reached), reached[0]))
    with written_in_one_step(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        notes = _notes(source if not Path(source).exists() else Path(source).resolve().name, table, len(rows), fitted)
        write_model_card(folder, out.name, base_model=source, notes=notes)
    print_table(f"{type(model).__name__}, calibrated on {len(rows)} samples", table)
    script = f": examples/{SCRIPTS[model.task]}.py --model {out.name}" if model.task in SCRIPTS else ""
    typer.echo(f"Wrote {out}. Nothing was trained; fine-tune it to recover what pruning costs{script}.")
