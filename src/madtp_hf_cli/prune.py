"""`madtp-hf prune`: turn a dense checkpoint into a calibrated, pruned one, without training."""

from typing import Annotated

import typer

from . import options
from .common import check_out, exit_if_rows_were_left_out, print_table, warnings_as_messages, written_in_one_step


def _notes(source: str, rows: list[dict], samples: int, method: str, fitted: bool) -> str:
    """Return what the model card says about pruning without training."""
    from madtp_hf.modeling.pruning_method import get_method

    choice = [] if method == "madtp" else [f"Tokens are chosen by the method `{method}`."]
    if get_method(method).importance_is_aligned:
        origin = "fitted to the same samples" if fitted else "those of the checkpoint"
        choice.append(f"The alignment tokens are {origin}.")
    lines = ["| reduction asked | reached | GFLOPs of a sample |", "|---:|---:|---:|"]
    lines += [f"| {row['reduction asked']:g} | {row['reached']:.1%} | {row['GFLOPs']:.4g} |" for row in rows]
    return f"""Pruned from `{source}` by `madtp-hf prune`, without training: the weights are the dense model's,
and budgets were calibrated on {samples} samples without labels. {" ".join(choice)}
No accuracy was measured: measure it before you rely on a budget.

""" + "\n".join(lines)


def calibrate_on(loaded, data, text, reductions, *, samples, seed, batch_size, alignment=None, freeze=False, **how):
    """Calibrate a loaded model on images, which is what pruning without training is.

    Returns:
        The rows read, the batches made of them, whether alignment tokens were fitted to them, and the warnings shown.
    """
    from madtp_hf import calibrate, init_alignment_from
    from madtp_hf.data.rows import load_rows
    from madtp_hf.tasks import make_batches

    with warnings_as_messages() as messages:
        rows = load_rows(loaded.task, data, text or (), samples=samples, seed=seed, **how)
    batches = make_batches(loaded.model, loaded.processor, rows, batch_size)
    is_fitted = loaded.is_dense if alignment is None else alignment == "fit"
    is_fitted &= loaded.model.pruning_method.importance_is_aligned
    if is_fitted:
        init_alignment_from(loaded.model, batches)
    with warnings_as_messages():
        calibrate(loaded.model, batches, reductions, freeze=freeze)
    return rows, batches, is_fitted, messages


def prune(
    model: options.Model,
    out: options.OutFolder,
    data: options.Data,
    reductions: Annotated[
        list[float] | None,
        typer.Option(
            metavar="R ...", help="Shares of FLOPs to save; the model loads at the first. Default: 0.5 0.3 0.7."
        ),
    ] = None,
    text: options.Texts = None,
    image_dir: options.ImageDir = None,
    columns: options.Columns = None,
    skip_unreadable: options.SkipUnreadable = False,
    samples: options.Samples = 200,
    seed: options.Seed = 0,
    task: options.Task = None,
    method: options.Method = None,
    layers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Prune in the first N layers alone; by default in all.")
    ] = None,
    alignment: Annotated[
        str | None,
        typer.Option(metavar="fit|keep", help="Fit alignment tokens to the data; by default new ones."),
    ] = None,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Fix how many tokens each layer keeps, as ONNX and CUDA graphs need.")
    ] = False,
    batch_size: options.BatchSize = 8,
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Prune a BLIP or CLIP without training: calibrate thresholds on a few unlabelled images.

    To recover what pruning costs, fine-tune with transformers' Trainer and madtp_hf.ReductionCallback.

    Example: madtp-hf prune Salesforce/blip-vqa-base out --data photos --question "what is it?"
    """
    given, out = out, out.resolve()
    check_out(out, model, force)
    if alignment not in (None, "fit", "keep"):
        raise ValueError(f"--alignment {alignment}: expected fit or keep.")
    from madtp_hf.budgets.calibration import read_reductions
    from madtp_hf.budgets.evaluation import evaluate_budgets, public_name
    from madtp_hf.checkpoints.card import write_model_card
    from madtp_hf.checkpoints.load import load
    from madtp_hf.modeling.pruning_method import get_method

    wanted = reductions or [0.5, 0.3, 0.7]
    read_reductions(wanted)  # fail before minutes of reading
    if method is not None:
        get_method(method)
    loaded = load(model, task, device=device).require_trained()
    pruned, processor = loaded.model, loaded.processor
    pruned.config.pruning_schedule = None  # it is calibrated anew
    if method is not None:
        pruned.set_pruning_method(method)
    if layers is not None:
        pruned.config.pruning_layers = layers
    method = pruned.config.pruning_method
    how = options.how_to_read(image_dir, columns, skip_unreadable)
    how |= {"samples": samples, "seed": seed, "batch_size": batch_size, "alignment": alignment, "freeze": freeze}
    rows, batches, fitted, messages = calibrate_on(loaded, data, text, wanted, **how)
    reached = [row["reduction"] for row in pruned.config.pruning_schedule]
    results = evaluate_budgets(pruned, batches, [0.0, *reached])
    table = [
        {"reduction asked": r.reduction_asked, "reached": r.reduction_reached, "GFLOPs": r.gflops} for r in results
    ]
    pruned.set_pruning(reduction=next((r for r in wanted if r in reached), reached[0]))
    with written_in_one_step(out) as folder:
        pruned.save_pretrained(folder)
        processor.save_pretrained(folder)
        notes = _notes(public_name(model), table, len(rows), method, fitted)
        write_model_card(folder, out.name, base_model=model, notes=notes)
    print_table(f"{type(pruned).__name__}, calibrated on {len(rows)} samples", table)
    typer.echo(
        f"Wrote {out}. Nothing was trained. Measure what pruning costs: `madtp-hf evaluate {given} --data ...`; to"
        " recover it, fine-tune with the Trainer and madtp_hf.ReductionCallback."
    )
    exit_if_rows_were_left_out(messages)
