"""Measure captions per second: `madtp-hf caption` against transformers' pipeline("image-text-to-text"), same files.

    python benchmarks/caption_speed.py --output benchmarks/results/caption_speed.json
    python benchmarks/caption_speed.py --size tiny --images 8 --calibration_images 8 --pipeline_batches 1 4   # a try

The models are BLIP-base with random weights, the images crops of photographs as JPEG files, the captions exactly 10
tokens long, greedy and with 3 beams. The time covers reading, resizing, generating and writing, but not loading the
model. `pipeline` is transformers' pipeline with its defaults, one image at a time; `pipeline-best` uses the batch size
that is fastest on this machine, found first on a part of the images. `off`, `0.5` and `0.8` are the job behind
`madtp-hf caption` with its defaults, unpruned or pruned to these reductions. Each round times every run once.
"""

import functools
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from photographs import draw_crops, photograph_crops
from random_models import SIZES, blip_config
from reporting import environment, make_parser, print_table, settings_of, write_json
from timing import Run, compare, time_runs, timed
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor, pipeline

from madtp_hf import MadtpBlipForConditionalGeneration, calibrate
from madtp_hf.jobs import Batch, Generation, Reader, Writer, make_output, open_rows, run_job


NEW_TOKENS, BEAMS, REDUCTIONS = 10, (1, 3), (0.5, 0.8)


def save_models(folder: Path, args) -> None:
    """Save a dense model with random weights, and ours with the same weights, calibrated on other crops."""
    torch.manual_seed(0)
    dense = BlipForConditionalGeneration(blip_config(args.size)).eval()
    text, side = dense.config.text_config, dense.config.vision_config.image_size
    words = ["[PAD]", "[unused]", "[unused2]", "[SEP]", "[CLS]", "[UNK]", "[MASK]"]
    words += [f"w{index}" for index in range(text.vocab_size - len(words))]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    text.sep_token_id = text.eos_token_id = tokenizer.sep_token_id
    text.pad_token_id = dense.generation_config.pad_token_id = tokenizer.pad_token_id
    dense.generation_config.eos_token_id = tokenizer.sep_token_id
    dense.generation_config.min_new_tokens = NEW_TOKENS
    processor = BlipProcessor(BlipImageProcessor(size={"height": side, "width": side}), tokenizer)
    model = MadtpBlipForConditionalGeneration.from_blip(dense)
    images = photograph_crops(args.calibration_images, side, seed=1)
    start = torch.full((4, NEW_TOKENS), text.bos_token_id)
    batches = [{"pixel_values": part, "input_ids": start[: len(part)]} for part in images.split(4)]
    model.prepare_for_inference()
    calibrate(model, batches, list(REDUCTIONS))
    model.generation_config.min_new_tokens = NEW_TOKENS
    for name, saved in (("dense", dense), ("pruned", model)):
        saved.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def ask_all(ask, files: list[str], beams: int, batch_size: int) -> None:
    """Caption all files with the pipeline."""
    settings = {"num_beams": beams, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    written = ask(images=files, text=["a"] * len(files), batch_size=batch_size, generate_kwargs=settings)
    assert len(written) == len(files)


def make_job(folder: Path, reduction: float, beams: int, args) -> Writer:
    generation = Generation(max_new_tokens=NEW_TOKENS, num_beams=beams)
    writer = Writer.load(folder / "pruned", float(reduction), generation, device=args.device, dtype=args.dtype)
    # Weights are prepared lazily, at a cost that doesn't depend on the number of images: exclude it.
    side = writer.model.config.vision_config.image_size
    writer(Batch([0], np.zeros((1, 3, side, side), dtype=np.uint8), [None]))
    return writer


def caption_all(writer: Writer, images: Path, args) -> None:
    """Caption all files with the job, including its own start and end."""
    with TemporaryDirectory() as work:
        reader = Reader(open_rows(images), writer.processor.image_processor)
        options = {"batch_size": args.batch_size, "num_workers": args.workers, "show_progress": False}
        summary = run_job(reader, writer, make_output(Path(work, "captions.jsonl")), **options)
        assert summary.images == len(reader.source) and not summary.errors


def measure(folder: Path, images: Path, beams: int, args) -> dict:
    files = [str(file) for file in sorted(images.iterdir())]
    ask = pipeline("image-text-to-text", model=str(folder / "dense"), device=args.device, dtype=args.dtype)
    tried = files[: max(args.pipeline_batches)]
    times = {}
    for size in args.pipeline_batches:
        times[size] = timed(functools.partial(ask_all, ask, tried, beams, size))[0]
    best = min(times, key=times.get)
    runs = [
        Run({"run": "pipeline"}, lambda: ask_all(ask, files, beams, 1)),
        Run({"run": "pipeline-best"}, lambda: ask_all(ask, files, beams, best)),
    ]
    config = MadtpBlipForConditionalGeneration.config_class.from_pretrained(folder / "pruned")
    for reduction in (0, *config.calibrated_reductions):  # small models don't reach all reductions
        writer = make_job(folder, reduction, beams, args)
        run = Run(
            {"run": f"{reduction:g}" if reduction else "off"}, lambda writer=writer: caption_all(writer, images, args)
        )
        runs.append(run)
    seconds = time_runs(runs, args.rounds)
    fastest = min(seconds[:2], key=statistics.median)
    rows = []
    for run, spent in zip(runs, seconds):
        of_best = compare(spent, fastest)
        rate = len(files) * 1000 / of_best["milliseconds"]
        rows.append(
            {
                "run": run.labels["run"],
                "captions a second": round(rate, 3),
                "times the pipeline's best": round(of_best["time_ratio"], 2),
            }
        )
    return {
        "pipeline's seconds an image by batch size": {
            str(size): round(spent / len(tried), 4) for size, spent in times.items()
        },
        "pipeline's best batch size": best,
        "rows": rows,
    }


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--calibration_images", type=int, default=16)
    parser.add_argument("--beams", type=int, nargs="+", default=BEAMS)
    parser.add_argument("--pipeline_batches", type=int, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--batch_size", type=int, help="The job's batch size; by default the job's own.")
    parser.add_argument("--workers", type=int, help="The job's worker processes; by default the job's own.")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    results = {"settings": settings_of(args), **environment()}
    with TemporaryDirectory() as work:
        folder, images = Path(work), Path(work, "images")
        images.mkdir()
        for index, crop in enumerate(draw_crops(args.images, seed=0)):
            crop.save(images / f"{index:04d}.jpg", quality=95)
        save_models(folder, args)
        for beams in args.beams:
            name = f"{beams} beam" + "s" * (beams > 1)
            results[name] = found = measure(folder, images, beams, args)
            print_table(name, found["rows"][0], [row.values() for row in found["rows"]])
            write_json(args.output, results)


if __name__ == "__main__":
    main()
