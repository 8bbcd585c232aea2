"""The job that `caption` and `ask` share."""

import typer

from .common import INTERRUPTED, SOME_FAILED, check_writable


def run(task: str, model: str, images: str, out, options: dict, question: str | None = None) -> None:
    """Run a job of `task`, `"captioning"` or `"vqa"`, with the command's options by name, and print a summary line."""
    try:
        summary, output = _run(task, model, images, out, options, question)
    except KeyboardInterrupt:
        typer.echo("\nStopped. Finished parts are kept: run the same command again to resume.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if summary is None:  # another process prints it
        return
    line = f"{output.out}: {summary.images} images"
    if summary.done_now:
        now = "" if summary.done_now == output.num_rows else f"{summary.done_now} of them now, "
        line += f", {now}{summary.seconds:.1f} s, {summary.done_now / summary.seconds:.1f} images/s"
    else:
        line += ", all done before"
    where = f", listed in {output.errors_file}" if summary.errors else ""
    typer.echo(f"{line}, {summary.errors} errors{where}")
    if summary.errors:
        raise typer.Exit(SOME_FAILED)


def _check_options(task: str, out, options: dict, question: str | None) -> None:
    """Raise a `ValueError` for options that can't work together."""
    for name in ("temperature", "top_p"):
        if options[name] is not None and not options["do_sample"]:
            raise ValueError(f"--{name} has no effect without --do-sample: pass both, or neither.".replace("_", "-"))
    if question is not None and not question.strip():
        raise ValueError(f"--question {question!r}: expected a question to ask of every image.")
    check_writable(out.expanduser())


def _run(task: str, model: str, images: str, out, options: dict, question: str | None):
    _check_options(task, out, options, question)
    import transformers

    from madtp_hf.jobs import Generation, ImageToText, Output, PreparedBatches, open_rows, run_job
    from madtp_hf.modeling.images import MAX_PIXELS

    transformers.utils.logging.disable_progress_bar()
    wanted = ("image", "key") if task == "captioning" else ("image", "question", "key")
    columns = dict(options["columns"] or ())
    source = open_rows(images, columns=columns, split=options["split"], image_dir=options["image_dir"], wanted=wanted)
    if task == "vqa" and question is None and "question" not in source.columns:
        raise ValueError(
            f"{images} has no questions: pass --question TEXT to ask one about every image, or a table with questions."
        )
    column = "caption" if task == "captioning" else "answer"
    Output(out, {}, len(source), column, options["suffix"])  # report a bad name before loading the model
    generation = Generation(**{name: options[name] for name in Generation.__dataclass_fields__ if name in options})
    dtype = options["dtype"] and options["dtype"].value
    writer = ImageToText(model, task, generation, options["device"], dtype, options["precision"].value)
    batch_size = options["batch_size"] or writer.batch_size(options["memory"])
    settings = {
        "command": "caption" if task == "captioning" else "ask",
        "model": writer.fingerprint,
        "images": source.fingerprint,
        **vars(generation),
        "question": question,
        "dtype": str(writer.dtype).removeprefix("torch."),
        "precision": writer.model.inference_precision,
        "max_pixels": options["max_pixels"] or MAX_PIXELS,
    }
    if generation.do_sample:
        settings["batch_size"] = batch_size  # tokens are sampled for a whole batch
    output = Output(out, settings, len(source), column, options["suffix"])
    refused = output.shared_side_files(source.keys()) if options["suffix"] else None
    batches = PreparedBatches(
        source, writer.processor.image_processor, task == "vqa", question, settings["max_pixels"], refused
    )
    summary = run_job(batches, writer, output, batch_size, options["workers"], options["force"])
    return summary, output
