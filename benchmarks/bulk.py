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

import functools
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from digit_tasks import load_model, make_batches, make_collator
from PIL import Image
from reporting import EXAMPLES, environment, make_parser, write_json

from madtp_hf import calibrate
from madtp_hf.data import load_digit_captions
from madtp_hf.data.digit_scenes import draw_scenes


CHECKS = ("bad_images", "killed", "ray")
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


def command(*arguments, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "madtp_hf_cli", *map(str, arguments)]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_raylet_start_wait_time_s": "300"}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def run(arguments: list[str], status: int = 0) -> tuple[str, int]:
    """Run a command that exits with `status`.

    Returns its last line of output and the peak resident memory of all its processes, in bytes.
    """
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
    if process.returncode != status:
        raise SystemExit(f"{' '.join(arguments)}\n{errors[-3000:]}")
    return printed.splitlines()[-1], peak


def run_killed(arguments: list[str], out: Path, num_parts: int, kills: int = 3) -> list[int]:
    """Run a command, kill it with all its processes after some more parts each time, then let it run to the end."""
    done, job = [], out.with_name(out.name + ".job")
    for kill in range(1, kills + 1):
        process = start(arguments)
        wanted = max(1, num_parts * kill // (kills + 1))
        while process.poll() is None and len(list(job.glob("part-*"))) < wanted:
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
        done.append(len(list(job.glob("part-*"))))
    run(arguments)
    return done


# Checks


def check_bad_images(model: Path, work: Path, number: int) -> tuple[dict, int]:
    images, out = work / f"images-{number}", work / f"texts-{number}"
    readable, unreadable = make_images(images, number)
    line, peak = run(command("caption", model, images, out, "--suffix", ".txt", *OPTIONS), SOME_ROWS_FAILED)
    written = {str(path.relative_to(out).with_suffix("")) for path in out.rglob("*.txt")}
    errors = [json.loads(text) for text in (work / f"{out.name}.errors.jsonl").read_text().splitlines()]
    listed = {row["key"]: row["error"] for row in errors}
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
    script = EXAMPLES / "caption_with_ray.py"
    run([sys.executable, str(script), str(model), str(images), str(out), "--workers", "2", *OPTIONS])
    return {"workers": 2, "same rows": out.read_bytes() == (work / "whole.jsonl").read_bytes()}


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=10000, help="how many, in the large folder")
    parser.add_argument("--fewer", type=int, default=1000, help="how many, in the small one")
    parser.add_argument("--resumed", type=int, default=2000, help="how many, in the runs that are killed")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="`ray` needs `killed`")
    args = parser.parse_args(arguments)
    known = json.loads(args.output.read_text()) if args.output and args.output.is_file() else {}

    def report(results: dict) -> None:
        """Print results and merge them into the output file."""
        print(json.dumps(results, indent=2), flush=True)
        known.update({**environment(), **results})
        write_json(args.output, known)

    with TemporaryDirectory() as work:
        work = Path(work)
        model, images = work / "model", work / "images-killed"
        make_model(model)
        if "bad_images" in args.only:
            _, few_peak = check_bad_images(model, work, args.fewer)
            bad_images, peak = check_bad_images(model, work, args.images)
            memory = {"ratio": round(peak / few_peak, 3)}
            for number, found in ((args.fewer, few_peak), (args.images, peak)):
                memory[f"MiB at {number} images"] = round(found / 2**20)
            report({"bad_images": bad_images, "memory": memory})
        if "killed" in args.only:
            make_images(images, args.resumed)
            report({"killed": check_kills(model, work, images, args.resumed)})
        if "ray" in args.only:
            report({"ray": check_ray(model, work, images)})


if __name__ == "__main__":
    main()
