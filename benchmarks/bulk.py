"""Test the guarantees of bulk jobs: bad images, memory, kills, several processes, two writers, Ray.

    python benchmarks/bulk.py --output benchmarks/results/bulk.json
    python benchmarks/bulk.py --images 600 --fewer 300 --resumed 100 --kills 3      # a quick trial

- `bad_images`: among many small images, 37 are broken or unusual in different ways. Each readable image gets its own
  caption in its own file; the others are listed as errors. The model is the captioning example for digits, pruned.
- `killed`: captions, embeddings and an index, in one process and in two, of pruned and of dense models: killed with
  kill -9 at random moments again and again, at last run to the end. The output equals an uninterrupted job's.
- `two_writers`: two jobs write the same index at the same time, again and again; it loads each time, complete.
- `memory`: the peak resident memory with many images and with few.
- `ray`: the same captions from two models on Ray.

The models of the last four are tiny and random: the job around them is what is tested. They run in forks of this
process, which need not import anything.
"""

import functools
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import PartialState
from digit_tasks import load_model, make_batches, make_collator
from PIL import Image
from reporting import EXAMPLES, environment, make_parser, write_json
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
)

from madtp_hf import MadtpBlipForConditionalGeneration, MadtpBlipForImageTextRetrieval, calibrate, jobs
from madtp_hf.data import load_digit_captions
from madtp_hf.data.digit_scenes import draw_scenes
from madtp_hf.search.index import build_index, load_index


CHECKS = ("bad_images", "killed", "two_writers", "memory", "ray")
OPTIONS = ("--reduction", "0.5", "--max_new_tokens", "6")
SOME_ROWS_FAILED = 3  # the exit code of `madtp-hf caption`


def make_model(folder: Path) -> None:
    """Save the captioning example, pruned without training and calibrated at 0.5."""
    source = EXAMPLES / "blip-captioning-digits"
    model, collator = load_model("captioning", source), make_collator("captioning", source)
    calibrate(model, make_batches("captioning", load_digit_captions("validation", 96), collator), [0.5])
    model.save_pretrained(folder)
    collator.processor.save_pretrained(folder)


# Images


def _scenes(number: int) -> list[Image.Image]:
    return [Image.fromarray(image) for image in draw_scenes(number, "test", np.random.default_rng(0)).images]


def make_images(folder: Path, number: int) -> tuple[set[str], set[str]]:
    """Write `number` images, 37 of them unusual or broken; return the paths of readable and of unreadable ones."""
    scenes = _scenes(200)
    odd = {**odd_images(scenes[0]), **broken_images(scenes[0])}
    readable, unreadable = set(), set()
    for index in range(number - len(odd)):
        name = f"{index % 7}/{index:06d}.{('png', 'jpg')[index % 2]}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scenes[index % len(scenes)].rotate(90 * (index // len(scenes) % 4)).save(folder / name)
        readable.add(name)
    for index, (name, write) in enumerate(odd.items()):
        stem, suffix = os.path.splitext(name)
        name = f"{index % 7}/{index * 250:06d}-{stem}{suffix}"  # spread over the folders, each among good ones
        write(folder / name)
        (unreadable if stem.startswith("bad") else readable).add(name)
    return readable, unreadable


def odd_images(scene: Image.Image) -> dict:
    """Return image kinds that are not plain RGB files but can be read: file name -> function that writes it."""
    gray, palette, exif = np.asarray(scene.convert("L")), scene.convert("P"), Image.Exif()
    palette.info["transparency"], exif[0x0112] = 0, 6
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [scene.rotate(90)] * 3}
    images = {
        "cmyk.jpg": (scene.convert("CMYK"), {}),
        "cmyk.tif": (scene.convert("CMYK"), {}),
        "deep.png": (deep, {}),
        "deep.tif": (deep, {}),
        "floats.tif": (Image.fromarray(gray.astype(np.float32) / 255), {}),
        "animated.gif": (scene, frames),
        "animated.webp": (scene, frames),
        "animated.png": (scene, frames),
        "palette.png": (palette, {"transparency": 0}),
        "alpha.png": (scene.convert("RGBA"), {}),
        "gray-alpha.png": (scene.convert("LA"), {}),
        "one-bit.png": (scene.convert("1"), {}),
        "gray.jpg": (scene.convert("L"), {}),
        "png-named.jpg": (scene, {"format": "PNG"}),
        "jpeg-named.png": (scene, {"format": "JPEG"}),
        "turned.jpg": (scene, {"exif": exif}),
        "one-pixel.png": (scene.resize((1, 1)), {}),
        "long.png": (scene.resize((3000, 2)), {}),
        "UPPER.JPG": (scene, {}),
    }
    return {name: functools.partial(Image.Image.save, image, **options) for name, (image, options) in images.items()}


def broken_images(scene: Image.Image) -> dict:
    """Return kinds of files that can't be read: file name -> function that writes it."""

    def encoded(kind: str, share: float = 1.0) -> bytes:
        buffer = io.BytesIO()
        scene.resize((300, 300)).save(buffer, format=kind)
        return buffer.getvalue()[: int(len(buffer.getvalue()) * share)]

    whole = encoded("PNG")
    contents = {
        "bad-cut.jpg": encoded("JPEG", 0.5),
        "bad-cut.png": encoded("PNG", 0.5),
        "bad-cut.gif": encoded("GIF", 0.1),
        "bad-cut.webp": encoded("WEBP", 0.3),
        "bad-cut.tif": encoded("TIFF", 0.5),
        "bad-cut.bmp": encoded("BMP", 0.5),
        "bad-header.jpg": encoded("JPEG", 0.02),
        "bad-damaged.png": whole[:40] + bytes(len(whole) // 2 - 40) + whole[len(whole) // 2 :],
        "bad-empty.jpg": b"",
        "bad-zeros.jpg": bytes(5000),
        "bad-text.jpg": b"404 Not Found",
        "bad-html.png": b"<html><body>Forbidden</body></html>",
        "bad-svg.jpg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    return {
        **{name: lambda path, content=content: path.write_bytes(content) for name, content in contents.items()},
        "bad-huge.png": lambda path: Image.new("1", (20000, 10000)).save(path),
        "bad-large.png": lambda path: Image.new("L", (10000, 9500)).save(path),
        "bad-link.jpg": lambda path: path.symlink_to("nowhere.jpg"),
        "bad-folder.png": lambda path: path.mkdir(),
        "bad-loop.jpg": lambda path: path.symlink_to(path.name),
    }


# Processes


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "madtp_hf_cli", *map(str, arguments)]


def run(arguments: list[str], status: int = 0) -> str:
    """Run a command that exits with `status`, and return its last line of output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_raylet_start_wait_time_s": "300"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode != status:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]


# Jobs in forks


def make_tiny_models(folder: Path) -> None:
    """Save tiny random models for captions and for retrieval, dense and pruned."""
    torch.manual_seed(0)
    words = "[PAD] [unused] [unused2] [SEP] [CLS] [UNK] [MASK] is there a seven three how many which digit".split()
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 24, "initializer_range": 0.2, "bos_token_id": 4}
    text |= {"sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "initializer_range": 0.2}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    kinds = {
        "caption": (BlipForConditionalGeneration, MadtpBlipForConditionalGeneration),
        "embed": (BlipForImageTextRetrieval, MadtpBlipForImageTextRetrieval),
    }
    for kind, (dense_class, pruned_class) in kinds.items():
        dense = dense_class(config).eval()
        pruned = pruned_class.from_blip(dense)
        pruned.set_pruning(temperature=3.0)
        for name, model in (("dense", dense), ("pruned", pruned)):
            model.save_pretrained(folder / f"{kind}-{name}")
            processor.save_pretrained(folder / f"{kind}-{name}")


def make_tiny_images(folder: Path, number: int) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(number):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index:06}.png")
    return folder


class TinyJob:
    """A job of one kind, `caption`, `embed` or `index`, that runs in forks."""

    def __init__(self, kind: str, models: Path, pruning: str, images: Path, out: Path):
        self.kind, self.images, self.out = kind, images, out
        source = models / f"{'caption' if kind == 'caption' else 'embed'}-{pruning}"
        options = (None, jobs.Generation(max_new_tokens=4)) if kind == "caption" else ()
        self.worker = (jobs.Writer if kind == "caption" else jobs.ImageEmbedder).load(source, *options, device="cpu")

    def run(self, batch_size: int = 4, pause: float = 0.0) -> None:
        options = {"batch_size": batch_size, "num_workers": 0, "save_interval": 0.02, "show_progress": False}
        if pause:
            compute = self.worker.compute
            self.worker.compute = lambda *inputs: (time.sleep(pause), compute(*inputs))[1]
        if self.kind == "index":
            build_index(self.worker, self.images, self.out, **options)
        else:
            reader = jobs.Reader(jobs.open_rows(self.images), self.worker.processor.image_processor)
            jobs.run_job(reader, self.worker, jobs.make_output(self.out), **options)

    def start(self, processes: int = 1, **options) -> list[int]:
        """Run in forks of this process, as many as `torchrun` would start; returns their ids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(processes):
            child = os.fork()
            if child:
                children.append(child)
                continue
            code = 1
            try:
                PartialState._reset_state()  # the parent may have been a process of its own
                if processes > 1:
                    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in places.items()})
                self.run(**options)
                code = 0
            except ValueError as error:
                code = 3 if "Another process" in str(error) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        return children

    def result(self):
        if self.kind == "index":
            index = load_index(self.out)
            return index.names, index.vectors.reconstruct_n(0, len(index)).tobytes()
        return self.out.read_bytes()

    def clear(self) -> None:
        for path in (self.out, self.out.with_name(self.out.name + ".job")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_again_and_again(job: TinyJob, processes: int, kills: int, expected, generator) -> dict:
    """Kill a job at random moments; whenever it ends before, compare its output, and begin another."""
    number, ended, wrong, grown, parts = 0, 0, 0, 0, set()
    state = job.out / "job" if job.kind == "index" else job.out.with_name(job.out.name + ".job")
    longest = 0.6 if processes == 1 else 2.0
    while number < kills or not ended:
        children, patience = job.start(processes, pause=0.01), generator.uniform(0, longest)
        deadline, running = time.monotonic() + (patience if number < kills else 600), {*children}
        codes = []
        while running and time.monotonic() < deadline:
            time.sleep(0.005)
            for child in [*running]:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    running.remove(child)
                    codes.append(os.waitstatus_to_exitcode(status))
        for child in running:
            os.kill(child, signal.SIGKILL)
        wait([*running])
        if running:
            number += 1
            found = {file.name for file in state.glob("part-*")}
            grown, parts = grown + bool(found - parts), found
            if job.kind == "index" and (job.out / "index.json").is_file():
                wrong += job.result()[0] != expected[0]  # the last good one
        else:
            ended += 1
            wrong += any(codes) or job.result() != expected
            job.clear()
            parts = set()
    return {
        "kills": number,
        "kills after new rows were saved": grown,
        "runs to the end": ended,
        "rows lost or doubled, or index damaged": wrong,
    }


# Checks


def check_bad_images(model: Path, work: Path, number: int) -> dict:
    images, out = work / f"images-{number}", work / f"texts-{number}"
    readable, unreadable = make_images(images, number)
    line = run(command("caption", model, images, out, "--suffix", ".txt", *OPTIONS), SOME_ROWS_FAILED)
    written = {str(path.relative_to(out).with_suffix("")) for path in out.rglob("*.txt")}
    errors = [json.loads(text) for text in (work / f"{out.name}.errors.jsonl").read_text().splitlines()]
    listed = {row["key"]: row["error"] for row in errors}
    return {
        "images": number,
        "odd": len(odd_images(_scenes(1)[0])),
        "broken": len(unreadable),
        "captions": len(written),
        "each to its own file": written == {os.path.splitext(name)[0] for name in readable},
        "listed": set(listed) == unreadable,
        "reasons": {key.partition("-")[2]: reason for key, reason in listed.items()},
        "last line": line.replace(str(work) + "/", ""),
    }


def tiny_jobs(work: Path, models: Path, images: Path):
    """Yield a job of each kind for dense and pruned models, and its undisturbed result."""
    for kind, name in (("caption", "c.jsonl"), ("embed", "e.parquet"), ("index", "index")):
        for pruning in ("pruned", "dense"):
            job = TinyJob(kind, models, pruning, images, work / f"{pruning}-{name}")
            if wait(job.start(pause=0.001)) != [0]:
                raise SystemExit(f"The job {kind} failed.")
            expected = job.result()
            job.clear()
            yield f"{kind}, {pruning}", job, expected


def check_kills(work: Path, models: Path, images: Path, kills: int) -> list[dict]:
    generator, rows = np.random.default_rng(0), []
    for name, job, expected in tiny_jobs(work, models, images):
        for processes in (1, 2):
            found = kill_again_and_again(job, processes, kills, expected, generator)
            rows.append({"job": name, "processes": processes, **found})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def check_two_writers(work: Path, models: Path, images: Path, times: int) -> dict:
    job = TinyJob("index", models, "pruned", images, work / "two")
    counts = {"times": times, "refused": 0, "failed": 0, "complete": 0}
    names = sorted(file.name for file in images.iterdir())
    for number in range(times):
        pairs = [job.start(pause=0.002)[0] for _ in range(2)]
        codes = wait(pairs)
        counts["refused"] += codes.count(3)
        counts["failed"] += sum(code not in (0, 3) for code in codes) + (codes.count(3) == 2)
        counts["complete"] += sorted(load_index(job.out).names) == names
        if number % 2:
            job.clear()
    return counts


def check_memory(work: Path, models: Path, numbers: list[int]) -> dict:
    peaks, rates = [], []
    for number in numbers:
        images = make_tiny_images(work / f"tiny-{number}", number)
        job, began = TinyJob("caption", models, "pruned", images, work / f"memory-{number}.jsonl"), time.monotonic()
        (child,) = job.start(batch_size=32)
        _, status, usage = os.wait4(child, 0)
        if status:
            raise SystemExit("The job failed.")
        peaks.append(usage.ru_maxrss / 2**10)
        rates.append(number / (time.monotonic() - began))
    found = {f"MiB at {number} images": round(peak) for number, peak in zip(numbers, peaks)}
    rates = {f"images a second of {number}": round(rate, 1) for number, rate in zip(numbers, rates)}
    return {"ratio": round(peaks[-1] / peaks[0], 3), **found, **rates}


def check_ray(work: Path, models: Path, images: Path) -> dict:
    whole, out = work / "whole.jsonl", work / "ray.jsonl"
    arguments = ("caption", models / "caption-pruned", images)
    run(command(*arguments, whole, "--max_new_tokens", 4))
    run(command(*arguments, out, "--max_new_tokens", 4, "--ray", 2))
    return {"models": 2, "same rows": out.read_bytes() == whole.read_bytes()}


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=20000, help="Images in the large folder.")
    parser.add_argument("--fewer", type=int, default=2000, help="Images in the small folder.")
    parser.add_argument("--resumed", type=int, default=200, help="Images in the runs that are killed.")
    parser.add_argument("--kills", type=int, default=20, help="How often each job is killed.")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = json.loads(args.output.read_text()) if args.output and args.output.is_file() else {}

    def report(name: str, found) -> None:
        """Print results and merge them into the output file."""
        print(json.dumps({name: found}, indent=2), flush=True)
        known.update({**environment(), name: found})
        write_json(args.output, known)

    with TemporaryDirectory() as work:
        work = Path(work)
        if "bad_images" in args.only:
            make_model(work / "model")
            report("bad_images", check_bad_images(work / "model", work, args.fewer))
        make_tiny_models(work / "models")
        images = make_tiny_images(work / "images", args.resumed)
        if "killed" in args.only:
            report("killed", check_kills(work, work / "models", images, args.kills))
        if "two_writers" in args.only:
            report("two_writers", check_two_writers(work, work / "models", images, args.kills))
        if "memory" in args.only:
            report("memory", check_memory(work, work / "models", [args.fewer, args.images]))
        if "ray" in args.only:
            report("ray", check_ray(work, work / "models", images))


if __name__ == "__main__":
    main()
