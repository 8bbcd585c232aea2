"""Test the guarantees of bulk captioning: bad images, memory, kills, several processes, Ray.

    python benchmarks/bulk.py --output benchmarks/results/bulk.json
    python benchmarks/bulk.py --images 600 --fewer 300 --resumed 600      # a quick trial

The model is the captioning example for digits, pruned at 0.5; the job around it is what is measured.

- `bad_images`: among many small images, 37 are broken or unusual in different ways. Each readable image gets its own
  caption in its own file; the others are listed as errors.
- `memory`: the peak resident memory of all processes, with many images and with few.
- `killed`: killed with kill -9 three times, then run to the end, in one process and in two: the output equals an
  uninterrupted job's byte for byte.
- `ray`: the same rows from examples/caption_with_ray.py with two workers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BlipProcessor

from madtp_hf import MadtpBlipForConditionalGeneration, calibrate
from madtp_hf.data import CaptioningCollator, load_digit_captions
from madtp_hf.data.digit_scenes import draw_scenes


ROOT = Path(__file__).parents[1]
CHECKS = ("bad_images", "killed", "ray")
OPTIONS = ("--reduction", "0.5", "--max_new_tokens", "6")


def make_model(folder: Path) -> None:
    source = ROOT / "examples" / "blip-captioning-digits"
    torch.manual_seed(0)
    processor = BlipProcessor.from_pretrained(source)
    model = MadtpBlipForConditionalGeneration.from_blip(str(source), dtype=torch.float32)
    collator = CaptioningCollator(processor, model.config.text_config.bos_token_id, "a picture of", None)
    samples = load_digit_captions("validation", 96)
    calibrate(model, DataLoader(samples, batch_size=32, collate_fn=collator), [0.5])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


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
        scene = scenes[index % len(scenes)].rotate(90 * (index // len(scenes) % 4))
        scene.save(folder / name)
        readable.add(name)
    for index, (name, write) in enumerate(odd.items()):
        # Spread the odd images over the folders, each among good ones.
        stem, suffix = os.path.splitext(name)
        name = f"{index % 7}/{index * 250:06d}-{stem}{suffix}"
        write(folder / name)
        (unreadable if stem.startswith("bad") else readable).add(name)
    return readable, unreadable


def odd_images(scene: Image.Image) -> dict:
    """Return image kinds that are not plain RGB files but can be read: file name -> function that writes it."""

    def deep(path):
        Image.fromarray(np.asarray(scene.convert("L"), dtype=np.uint16) * 257).save(path)

    def palette(path):
        image = scene.convert("P")
        image.info["transparency"] = 0
        image.save(path, transparency=0)

    def turned(path):
        exif = Image.Exif()
        exif[0x0112] = 6
        scene.save(path, exif=exif)

    return {
        "cmyk.jpg": lambda path: scene.convert("CMYK").save(path),
        "cmyk.tif": lambda path: scene.convert("CMYK").save(path),
        "deep.png": deep,
        "deep.tif": deep,
        "floats.tif": lambda path: Image.fromarray(np.asarray(scene.convert("L"), np.float32) / 255).save(path),
        "animated.gif": lambda path: scene.save(path, save_all=True, append_images=[scene.rotate(90)] * 3),
        "animated.webp": lambda path: scene.save(path, save_all=True, append_images=[scene.rotate(90)] * 3),
        "animated.png": lambda path: scene.save(path, save_all=True, append_images=[scene.rotate(90)] * 3),
        "palette.png": palette,
        "alpha.png": lambda path: scene.convert("RGBA").save(path),
        "gray-alpha.png": lambda path: scene.convert("LA").save(path),
        "one-bit.png": lambda path: scene.convert("1").save(path),
        "gray.jpg": lambda path: scene.convert("L").save(path),
        "png-named.jpg": lambda path: scene.save(path, format="PNG"),
        "jpeg-named.png": lambda path: scene.save(path, format="JPEG"),
        "turned.jpg": turned,
        "one-pixel.png": lambda path: scene.resize((1, 1)).save(path),
        "long.png": lambda path: scene.resize((3000, 2)).save(path),
        "UPPER.JPG": lambda path: scene.save(path),
    }


def broken_images(scene: Image.Image) -> dict:
    """Return kinds of files that can't be read: file name -> function that writes it."""

    def part_of(kind: str, share: float):
        def write(path):
            scene.resize((300, 300)).save(path, format=kind)
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

        return write

    def damaged(path):
        scene.resize((300, 300)).save(path)
        content = bytearray(path.read_bytes())
        content[40 : len(content) // 2] = bytes(len(content) // 2 - 40)
        path.write_bytes(content)

    return {
        "bad-cut.jpg": part_of("JPEG", 0.5),
        "bad-cut.png": part_of("PNG", 0.5),
        "bad-cut.gif": part_of("GIF", 0.1),
        "bad-cut.webp": part_of("WEBP", 0.3),
        "bad-cut.tif": part_of("TIFF", 0.5),
        "bad-cut.bmp": part_of("BMP", 0.5),
        "bad-header.jpg": part_of("JPEG", 0.02),
        "bad-damaged.png": damaged,
        "bad-empty.jpg": lambda path: path.touch(),
        "bad-zeros.jpg": lambda path: path.write_bytes(bytes(5000)),
        "bad-text.jpg": lambda path: path.write_text("404 Not Found"),
        "bad-html.png": lambda path: path.write_text("<html><body>Forbidden</body></html>"),
        "bad-svg.jpg": lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "bad-huge.png": lambda path: Image.new("1", (20000, 10000)).save(path),
        "bad-large.png": lambda path: Image.new("L", (10000, 9500)).save(path),
        "bad-link.jpg": lambda path: path.symlink_to("nowhere.jpg"),
        "bad-folder.png": lambda path: path.mkdir(),
        "bad-loop.jpg": lambda path: path.symlink_to(path.name),
    }


def command(*arguments, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "madtp_hf_cli", *map(str, arguments)]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_raylet_start_wait_time_s": "300"}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def run(arguments: list[str]) -> tuple[str, int]:
    """Run a command; return its last line of output and the peak resident memory of all its processes, in bytes."""
    process, peak = start(arguments), 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            tree = [watched, *watched.children(recursive=True)]
            peak = max(peak, sum(child.memory_info().rss for child in tree))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.1)
    printed, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{errors[-3000:]}")
    return printed.splitlines()[-1], peak


def run_killed(arguments: list[str], out: Path, num_parts: int, kills: int = 3) -> list[int]:
    """Run a command, kill it with all its processes after some more parts each time, then let it run to the end."""
    done = []
    for kill in range(1, kills + 1):
        process = start(arguments)
        wanted = max(1, num_parts * kill // (kills + 1))
        while process.poll() is None and len(list(out.with_name(out.name + ".job").glob("part-*"))) < wanted:
            time.sleep(0.02)
        time.sleep(0.3)  # kill in the middle of a part
        if process.poll() is not None:
            raise SystemExit(
                f"It ended before it could be killed: give more images.\n{process.communicate()[1][-2000:]}"
            )
        # torchrun's processes have their own sessions and would outlive it.
        for killed in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            killed.kill()
        process.communicate()
        done.append(len(list(out.with_name(out.name + ".job").glob("part-*"))))
    run(arguments)
    return done


def check_bad_images(model: Path, work: Path, number: int) -> tuple[dict, int]:
    images, out = work / f"images-{number}", work / f"texts-{number}"
    readable, unreadable = make_images(images, number)
    line, peak = run(command("caption", model, images, out, "--suffix", ".txt", *OPTIONS))
    written = {str(path.relative_to(out).with_suffix("")) for path in out.rglob("*.txt")}
    listed = {}
    for text in (work / f"{out.name}.errors.jsonl").read_text().splitlines():
        row = json.loads(text)
        listed[row["key"]] = row["error"]
    result = {
        "images": number,
        "odd": len(odd_images(_scenes(1)[0])),
        "broken": len(unreadable),
        "captions": len(written),
        "each to its own file": written == {os.path.splitext(name)[0] for name in readable},
        "listed": set(listed) == unreadable,
        "reasons": {key.partition("-")[2]: reason for key, reason in listed.items()},
        "last line": line.replace(str(work) + "/", ""),
    }
    return result, peak


def check_kills(model: Path, work: Path, images: Path, number: int) -> dict:
    whole = work / "whole.jsonl"
    run(command("caption", model, images, whole, *OPTIONS))
    results, num_parts = {}, -(-number // 256)
    for processes in (1, 2):
        out = work / f"killed-{processes}.jsonl"
        arguments = command("caption", model, images, out, *OPTIONS, processes=processes)
        killed_at = run_killed(arguments, out, num_parts)
        results[f"{processes} process" + "es" * (processes - 1)] = {
            "parts done at each kill": killed_at,
            "same rows": out.read_bytes() == whole.read_bytes(),
        }
    return {"images": number, "parts": num_parts, **results}


def check_ray(model: Path, work: Path, images: Path) -> dict:
    out = work / "ray.jsonl"
    script = ROOT / "examples" / "caption_with_ray.py"
    run([sys.executable, str(script), str(model), str(images), str(out), "--workers", "2", *OPTIONS])
    return {"workers": 2, "same rows": out.read_bytes() == (work / "whole.jsonl").read_bytes()}


def report(results: dict, output: Path | None) -> None:
    """Print the results and merge them into the output file."""
    print(json.dumps(results, indent=2), flush=True)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(output.read_text()) if output.is_file() else {}
        output.write_text(json.dumps({**before, **results}, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000, help="how many, in the large folder")
    parser.add_argument("--fewer", type=int, default=1000, help="how many, in the small one")
    parser.add_argument("--resumed", type=int, default=2000, help="how many, in the runs that are killed")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="`ray` needs `killed`")
    parser.add_argument("--output", type=Path, help="others' results in this file stay")
    args = parser.parse_args()
    with TemporaryDirectory() as work:
        work = Path(work)
        make_model(work / "model")
        if "bad_images" in args.only:
            _, few_peak = check_bad_images(work / "model", work, args.fewer)
            bad_images, peak = check_bad_images(work / "model", work, args.images)
            memory = {
                f"MiB at {args.fewer} images": round(few_peak / 2**20),
                f"MiB at {args.images} images": round(peak / 2**20),
                "ratio": round(peak / few_peak, 3),
            }
            report({"bad_images": bad_images, "memory": memory}, args.output)
        images = work / "images-killed"
        if "killed" in args.only:
            make_images(images, args.resumed)
            report({"killed": check_kills(work / "model", work, images, args.resumed)}, args.output)
        if "ray" in args.only:
            report({"ray": check_ray(work / "model", work, images)}, args.output)


if __name__ == "__main__":
    main()
