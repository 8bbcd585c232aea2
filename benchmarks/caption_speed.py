"""Measure captions per second: `madtp-hf caption` against transformers' pipeline("image-text-to-text"), same files.

    python benchmarks/caption_speed.py --output benchmarks/results/caption_speed.json
    python benchmarks/caption_speed.py --size tiny --images 8 --calibration_images 8 --pipeline_batches 1 4   # a try

The models are BLIP-base with random weights, the images crops of photographs as JPEG files, the captions exactly 10
tokens long, greedy and with 3 beams. The time covers reading, resizing, generating and writing, but not loading the
model. `pipeline` is transformers' pipeline with its defaults, one image at a time; `pipeline-best` uses the batch size
that is fastest on this machine, found first on a part of the images. `off`, `0.5` and `0.8` are the job behind
`madtp-hf caption` with its defaults, unpruned or pruned to these reductions. Each round times every run once.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from photographs import SMALLEST_CROP, photograph_crops
from PIL import Image
from sklearn.datasets import load_sample_images
from speed import SIZES, blip_config
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor, pipeline

from madtp_hf import MadtpBlipForConditionalGeneration, calibrate
from madtp_hf.jobs import Generation, ImageToText, Output, PreparedBatches, open_source, run_job


NEW_TOKENS, BEAMS, REDUCTIONS = 10, (1, 3), (0.5, 0.8)


def save_crops(folder: Path, number: int) -> None:
    """Save square crops of two photographs, with random positions and sizes, as JPEG files."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    for index in range(number):
        photograph = photographs[rng.integers(len(photographs))]
        side = int(rng.integers(SMALLEST_CROP, min(photograph.size) + 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
        photograph.crop((left, top, left + side, top + side)).save(folder / f"{index:04d}.jpg", quality=95)


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


def make_pipeline(folder: Path, args):
    return pipeline("image-text-to-text", model=str(folder / "dense"), device=args.device, dtype=args.dtype)


def time_pipeline(ask, files: list[str], beams: int, batch_size: int) -> float:
    """Return the seconds that the pipeline takes for all files."""
    settings = {"num_beams": beams, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    began = time.perf_counter()
    written = ask(images=files, text=["a"] * len(files), batch_size=batch_size, generate_kwargs=settings)
    assert len(written) == len(files)
    return time.perf_counter() - began


def time_job(writer: ImageToText, images: Path, args) -> float:
    """Return the seconds that the job takes for all files, including its own start and end."""
    with TemporaryDirectory() as work:
        source = open_source(images)
        output = Output(Path(work, "captions.jsonl"), {}, len(source), "caption")
        batches = PreparedBatches(source, writer.processor.image_processor)
        batch_size = args.batch_size or writer.batch_size()
        began = time.perf_counter()
        summary = run_job(batches, writer, output, batch_size, args.workers, show_progress=False)
        assert summary.images == len(source) and not summary.errors
        return time.perf_counter() - began


def measure(folder: Path, images: Path, args) -> dict:
    files = [str(file) for file in sorted(images.iterdir())]
    ask = make_pipeline(folder, args)
    config = MadtpBlipForConditionalGeneration.config_class.from_pretrained(folder / "pruned")
    reached = [entry[0] for entry in config.pruning_schedule]  # small models don't reach all reductions
    results = {}
    for beams in args.beams:
        tried = files[: max(args.pipeline_batches)]
        times = {size: time_pipeline(ask, tried, beams, size) / len(tried) for size in args.pipeline_batches}
        best = min(times, key=times.get)
        seconds: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            seconds.setdefault("pipeline", []).append(time_pipeline(ask, files, beams, 1))
            seconds.setdefault("pipeline-best", []).append(time_pipeline(ask, files, beams, best))
            for reduction in (0, *reached):
                generation = Generation(float(reduction), max_new_tokens=NEW_TOKENS, num_beams=beams)
                writer = ImageToText(folder / "pruned", "captioning", generation, args.device, args.dtype)
                # Weights are prepared lazily, at a cost that doesn't depend on the number of images: exclude it.
                side = writer.model.config.vision_config.image_size
                writer(np.zeros((1, 3, side, side), dtype=np.uint8))
                seconds.setdefault(str(reduction or "off"), []).append(time_job(writer, images, args))
                del writer
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        results[f"{beams} beam" + "s" * (beams > 1)] = {
            "pipeline's seconds an image by batch size": {size: round(value, 4) for size, value in times.items()},
            "pipeline's best batch size": best,
            "captions a second": {name: round(len(files) / value, 3) for name, value in medians.items()},
            "times the pipeline's best": {
                name: round(min(medians["pipeline"], medians["pipeline-best"]) / value, 2)
                for name, value in medians.items()
            },
        }
        print(json.dumps(results, indent=2), flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--calibration_images", type=int, default=16)
    parser.add_argument("--beams", type=int, nargs="+", default=BEAMS)
    parser.add_argument("--pipeline_batches", type=int, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--batch_size", type=int, help="of the job; its default if not given")
    parser.add_argument("--workers", type=int, help="of the job; its default if not given")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as work:
        folder, images = Path(work), Path(work, "images")
        images.mkdir()
        save_crops(images, args.images)
        save_models(folder, args)
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
        }
        results = {"settings": settings, "versions": versions, **measure(folder, images, args)}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
