"""The job that `caption`, `ask`, `embed` and `index` share."""

import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import typer

from .common import INTERRUPTED, SOME_FAILED, check_writable


def run(kind: str, model: str, images: str, out: Path, options: dict, text: str | None = None) -> None:
    """Run a job and print a summary line.

    kind: the name of a `Worker` in `madtp_hf.jobs`. options: the command's, by name. text: for rows without one.
    """
    with says_what_is_kept():
        summary, output, worker = _run(kind, model, images, out, options, text)
    if summary is None:  # another process prints it
        return
    line = f"{output.out}: {summary.images} {'images' if worker.reads_images else 'texts'}"
    if summary.done_now:
        now = f"{summary.done_now} of them now, " * (summary.done_now != summary.images + summary.errors)
        line += f", {now}{summary.seconds:.1f} s, {summary.done_now / summary.seconds:.1f} images/s"
    else:
        line += ", all done before"
    where = f", listed in {output.errors_file}" * bool(summary.errors)
    typer.echo(f"{line}, {summary.errors} errors{where}; pruning: {worker.pruning_note()}")
    if summary.errors:
        raise typer.Exit(SOME_FAILED)


def _run(kind: str, model: str, images: str, out: Path, options: dict, text: str | None):
    for name in ("temperature", "top_p"):
        if options.get(name) is not None and not options["do_sample"]:
            raise ValueError(f"--{name} has no effect without --do-sample: pass both, or neither.".replace("_", "-"))
    if text is not None and not text.strip():
        raise ValueError(f"--{'question' if kind == 'Answerer' else 'text'} {text!r}: expected words.")
    check_writable(out.expanduser())
    from madtp_hf import jobs

    worker_class = getattr(jobs, kind)
    output = jobs.make_output(out, options.get("suffix"))  # reports a bad name before the model is loaded
    columns = dict(options["columns"] or ())
    if kind == "TextEmbedder" and images.endswith(".txt"):
        columns.setdefault("captions", "image")  # what a line holds
    source = jobs.open_rows(
        images, columns=columns, split=options["split"], image_dir=options["image_dir"], wanted=worker_class.wanted()
    )
    needed = worker_class.text_column
    if needed in source.columns and kind != "Answerer":
        text = None
    if needed is not None and text is None and needed not in source.columns:
        raise ValueError(
            f"{images} has no questions: pass --question TEXT to ask one about every image, or a table with questions."
            if kind == "Answerer"
            else f"{images} has no texts: pass a table with a column text or caption."
        )
    extra: tuple = ()
    if "max_new_tokens" in options:
        names = jobs.Generation.__dataclass_fields__
        extra = (jobs.Generation(**{name: options[name] for name in names if name in options}),)
    worker = load_worker(worker_class, model, options, *extra)
    reader = jobs.Reader(
        source,
        worker.processor.image_processor if worker.reads_images else None,
        needed,
        text,
        options["max_pixels"],
    )
    return (
        jobs.run_job(reader, worker, output, retry_errors=options["retry_errors"], **running(worker, options)),
        output,
        worker,
    )


def load_worker(worker_class, model: str, options: dict, *extra):
    """Load the model of a job's worker, pruned as the options say."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    how = {name: options[name] and options[name].value for name in ("dtype", "precision")}
    how |= {"device": options["device"], "revision": options.get("revision")}
    return worker_class.load(model, options["reduction"], *extra, **how)


def running(worker, options: dict) -> dict:
    """Return the arguments of `run_job` that these options stand for."""
    ray = options["ray"]
    return {
        "batch_size": options["batch_size"] or worker.batch_size(options["memory"]),
        "num_workers": options["workers"],
        "force": options["force"],
        "show_progress": True,
        "ray": 0 if ray is None and os.environ.get("RAY_ADDRESS") else ray,
    }


@contextmanager
def says_what_is_kept():
    """On Ctrl-C or SIGTERM, which clusters send, say how many rows are kept, and exit."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if on_main_thread else None
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = str(stop) or "finished rows are kept"
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"\nStopped: {kept}. Run the same command again to resume.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
