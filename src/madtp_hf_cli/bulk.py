"""What `caption` and `ask` share: their options, and the job that they run."""

from pathlib import Path
from typing import Annotated

import typer

from .common import one_message_of_errors


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A pruned checkpoint, or a dense BLIP: folder or Hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="captions.parquet or .jsonl; with --suffix, a folder.")]
Suffix = Annotated[str | None, typer.Option(metavar=".txt", help="A file an image: OUT/a/b.txt of a/b.jpg.")]
Reduction = Annotated[float | None, typer.Option(help="Prune to this budget, such as 0.5; 0 is off.")]
NewTokens = Annotated[int, typer.Option("--max_new_tokens", metavar="N", min=1, help="The longest text, in tokens.")]
Beams = Annotated[int, typer.Option("--num_beams", metavar="N", min=1, help="Beams to search; 1 is greedy.")]
DoSample = Annotated[bool, typer.Option("--do_sample", help="Draw words instead of taking the likeliest.")]
Temperature = Annotated[float | None, typer.Option(help="Of --do_sample.")]
TopP = Annotated[float | None, typer.Option("--top_p", help="Of --do_sample.")]
Seed = Annotated[int, typer.Option(help="Of --do_sample.")]
Device = Annotated[str | None, typer.Option(metavar="cpu|cuda", help="A GPU if there is one, if not given.")]
Dtype = Annotated[str | None, typer.Option(help="float32 on a CPU, bfloat16 on a GPU, if not given.")]
Memory = Annotated[str | None, typer.Option(metavar="SIZE", help="Memory for batches, such as 2GB.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch_size", metavar="N", min=1, help="Images at a time, instead of --memory.")
]
Workers = Annotated[int | None, typer.Option(metavar="N", min=0, help="Processes that read images; 0: none.")]
Split = Annotated[str | None, typer.Option(help="Of a data set with several.")]
ImageColumn = Annotated[str | None, typer.Option("--image_column", metavar="NAME", help="A table's column of images.")]
QuestionColumn = Annotated[
    str | None, typer.Option("--question_column", metavar="NAME", help="A table's column of questions.")
]
KeyColumn = Annotated[
    str | None, typer.Option("--key_column", metavar="NAME", help="A table's column of names of rows.")
]
ImageRoot = Annotated[
    Path | None, typer.Option("--image_root", metavar="FOLDER", help="Where a list's paths begin; its folder.")
]
MaxPixels = Annotated[
    int | None,
    typer.Option("--max_pixels", help="List larger images as errors; 89 million if not given.", metavar="N"),
]
Force = Annotated[bool, typer.Option("--force", help="Start anew, and replace OUT.")]

_DTYPES = ("float32", "bfloat16", "float16")


def run(task: str, model: str, images: str, out: Path, options: dict, question: str | None = None) -> None:
    """Run a job of `task`, `"captioning"` or `"vqa"`, with the command's options by name, and print a summary line."""
    try:
        with one_message_of_errors():
            summary, output = _run(task, model, images, out, options, question)
    except KeyboardInterrupt:
        typer.echo("\nStopped: finished parts are kept, and the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
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


def _run(task: str, model: str, images: str, out: Path, options: dict, question: str | None):
    if options["dtype"] not in (None, *_DTYPES):
        raise typer.BadParameter(f"{options['dtype']!r}, expected {', '.join(_DTYPES)}.", param_hint="--dtype")
    import transformers

    from madtp_hf.jobs import (
        Generation,
        ImageToText,
        Output,
        PreparedBatches,
        open_rows,
        parse_memory,
        run_job,
    )
    from madtp_hf.modeling.images import MAX_PIXELS

    transformers.utils.logging.disable_progress_bar()
    memory = None if options["memory"] is None else parse_memory(options["memory"])
    wanted = ("image", "key") if task == "captioning" else ("image", "question", "key")
    columns = {name: options.get(f"{name}_column") for name in wanted}
    column = "caption" if task == "captioning" else "answer"
    source = open_rows(images, columns=columns, image_dir=options["image_root"], split=options["split"], wanted=wanted)
    if task == "vqa" and question is None and "question" not in source.columns:
        raise ValueError(f"{source.name} has no questions: ask one of all images with --question.")
    Output(out, {}, len(source), column, options["suffix"])  # report a bad name before loading the model
    generation = Generation(**{name: options[name] for name in Generation.__dataclass_fields__ if name in options})
    writer = ImageToText(model, task, generation, options["device"], options["dtype"])
    batch_size = options["batch_size"] or writer.batch_size(memory)
    settings = {
        "command": "caption" if task == "captioning" else "ask",
        "model": writer.fingerprint,
        "images": source.fingerprint,
        **vars(generation),
        "question": question,
        "dtype": str(writer.dtype).removeprefix("torch."),
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
