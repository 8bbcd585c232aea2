"""`madtp-hf export`: export a checkpoint to ONNX graphs."""

from enum import Enum
from typing import Annotated

import typer

from . import options
from .common import check_out, exit_if_rows_were_left_out
from .prune import calibrate_on


class Precisions(str, Enum):
    float32 = "float32"
    int8 = "int8"


def export(
    model: options.Model,
    out: options.OutFolder,
    onnx: Annotated[bool, typer.Option("--onnx", help="The only format.")] = True,
    reduction: Annotated[
        float | None,
        typer.Option(
            "--reduction",
            "--reductions",
            metavar="R",
            help="Share of FLOPs to save; 0 is off. By default as saved, or 0.5 with --data.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "--images", metavar="PATH", help="Calibrate and freeze the model on these images."),
    ] = None,
    text: options.Texts = None,
    image_dir: options.ImageDir = None,
    columns: options.Columns = None,
    skip_unreadable: options.SkipUnreadable = False,
    samples: options.Samples = 200,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 8,
    task: options.Task = None,
    precision: Annotated[
        Precisions, typer.Option(metavar="TYPE", help="float32, or int8: onnxruntime's dynamic quantization.")
    ] = Precisions.float32,
    force: options.Force = False,
) -> None:
    """Write a checkpoint, pruned or dense, as ONNX graphs, with onnx.json, processor files and a runner.

    A graph keeps a fixed number of tokens: --data calibrates and freezes the model first, as prune --freeze does.
    The runner answers with onnxruntime, without torch.

    Example: madtp-hf export Salesforce/blip-vqa-base out --data photos --question "what is it?" --reduction 0.5
    """
    out = out.resolve()
    check_out(out, model, force)
    from transformers.utils import logging

    from madtp_hf.checkpoints.load import load
    from madtp_hf.serving.onnx_export import export_onnx

    logging.disable_progress_bar()  # of loading
    loaded = load(model, task, device="cpu").require_trained()
    exported, messages = loaded.model, []
    if data is not None:
        reduction = 0.5 if reduction is None else reduction
        how = options.how_to_read(image_dir, columns, skip_unreadable)
        how |= {"samples": samples, "seed": seed, "batch_size": batch_size, "freeze": True}
        *_, messages = calibrate_on(loaded, data, text, [reduction], **how)
    if reduction is not None:
        exported.set_pruning(reduction=reduction)
    if exported.is_pruning and exported.config.pruning_granularity != "frozen":
        raise ValueError(
            f"{model} keeps a number of tokens that depends on its input, which a graph can't: pass --data to"
            " calibrate and freeze it, or --reduction 0."
        )
    try:
        export_onnx(exported, loaded.processor, out, precision=precision.value, force=force)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    counts = exported.start_pass().token_counts
    pruned = "pruning off" if counts is None else f"{counts['vision'][-1]} image tokens left"
    typer.echo(
        f"{out}: {type(exported).__name__}, {pruned}, {precision.value}; run it with the folder's onnx_runner.py."
    )
    exit_if_rows_were_left_out(messages)
