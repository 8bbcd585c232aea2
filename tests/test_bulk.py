"""`madtp-hf caption` and `madtp-hf ask`: what they read and write, and that no bad image and no kill costs a row."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from madtp_hf.data import open_rows
from madtp_hf_cli import app

from .conftest import make_processor, make_task_model


ROOT = Path(__file__).parents[1]
NUMBER = 9


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def save_model(task, folder):
    """A small random model that writes different things about different images."""
    model = make_task_model(task, {"pruning_schedule": [[0.5, 3.0]]})
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {task: save_model(task, folder / task) for task in ("captioning", "vqa")}


def picture(index: int) -> Image.Image:
    generator = np.random.default_rng(index)
    tiles = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((48, 48), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine pictures in two folders, and a text that is none of them."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    for index in range(NUMBER):
        picture(index).save(folder / name_of(index))
    (folder / "notes.txt").write_text("no image")
    return folder


def name_of(index: int) -> str:
    return f"{'sub/' if index >= 6 else ''}{index}.png"


def read_rows(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet", reason="needs pyarrow").read_table(file).to_pylist()
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(models, folder, tmp_path_factory):
    """The caption of each picture by its name, each by a call of its own."""
    from madtp_hf import MadtpBlipForConditionalGeneration

    model = MadtpBlipForConditionalGeneration.from_pretrained(models["captioning"]).eval()
    model.set_pruning(reduction=0.5)
    processor = make_processor()
    captions = {}
    for index in range(NUMBER):
        pixels = processor.image_processor(picture(index), return_tensors="pt").pixel_values
        ids = model.generate(pixels, max_new_tokens=6, num_beams=1)
        captions[name_of(index)] = processor.tokenizer.decode(ids[0, 1:], skip_special_tokens=True).strip()
    assert len(set(captions.values())) > 3
    return captions


def caption(models, images, out, *options):
    return invoke("caption", models["captioning"], images, out, "--reduction", 0.5, "--max-new-tokens", 6, *options)


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.parquet"])
@pytest.mark.parametrize("options", [(), ("--batch-size", 2, "--workers", 2)])
def test_a_folder_is_captioned_in_order_whatever_the_batch(models, folder, expected, tmp_path, name, options):
    result = caption(models, folder, tmp_path / name, *(options or ("--workers", 0)))
    assert result.exit_code == 0, result.stderr
    rows = read_rows(tmp_path / name)
    assert [row["row"] for row in rows] == list(range(NUMBER))
    assert [row["key"] for row in rows] == [name_of(index) for index in range(NUMBER)]
    assert {row["key"]: row["caption"] for row in rows} == expected
    assert f"{name}: 9 images, " in result.stdout and "images/s, 0 errors" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.job"]


def test_side_files_beside_the_images_or_in_a_tree_of_their_own(models, folder, expected, tmp_path):
    assert caption(models, folder, tmp_path / "texts", "--suffix", ".caption", "--workers", 0).exit_code == 0
    written = {
        str(path.relative_to(tmp_path / "texts")): path.read_text() for path in (tmp_path / "texts").rglob("*.*")
    }
    assert written == {name.replace(".png", ".caption"): text + "\n" for name, text in expected.items()}

    images = tmp_path / "images"
    images.mkdir()
    picture(0).save(images / "0.png")
    picture(1).save(images / "0.gif")  # whose text would be the same file
    for _ in range(2):  # what the first run wrote is no image of the second
        result = caption(models, images, images, "--suffix", ".txt", "--workers", 0)
        assert result.exit_code == 3, result.stderr
        assert sorted(path.name for path in images.iterdir()) == ["0.gif", "0.png", "0.txt"]
    assert "1 images, all done before, 1 errors" in result.stdout
    (error,) = read_rows(tmp_path / "images.errors.jsonl")
    assert error == {"row": 1, "key": "0.png", "error": "its text file is that of 0.gif"}


def bad_files(folder: Path) -> dict[str, str]:
    """Broken images among the good ones, with what is to be said of them."""
    picture(0).resize((300, 300)).save(folder / "0-cut.png")
    content = (folder / "0-cut.png").read_bytes()
    (folder / "0-cut.png").write_bytes(content[: len(content) // 2])
    (folder / "1-text.jpg").write_text("404 Not Found")
    (folder / "2-empty.jpg").touch()
    Image.new("1", (20000, 10000)).save(folder / "3-huge.png")
    (folder / "4-link.jpg").symlink_to("nowhere")
    (folder / "5-folder.png").mkdir()
    return {
        "0-cut.png": "truncated",
        "1-text.jpg": "not an image",
        "2-empty.jpg": "an empty file",
        "3-huge.png": "20000 x 10000 pixels, more than the limit of 89478485",
        "4-link.jpg": "a broken symlink",
        "5-folder.png": "it is a directory",
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_listed_and_move_no_caption(models, expected, tmp_path, workers):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for index in range(NUMBER):
        picture(index).save(images / name_of(index))
    bad = bad_files(images)
    result = caption(models, images, tmp_path / "c.jsonl", "--batch-size", 4, "--workers", workers)
    assert result.exit_code == 3, result.stderr
    assert f"6 errors, listed in {tmp_path / 'c.errors.jsonl'}" in result.stdout
    assert {row["key"]: row["caption"] for row in read_rows(tmp_path / "c.jsonl")} == expected
    errors = {row["key"]: row["error"] for row in read_rows(tmp_path / "c.errors.jsonl")}
    assert errors.keys() == bad.keys()
    assert all(bad[key] in errors[key] for key in bad), errors


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_source(kind: str, folder: Path, tmp_path: Path):
    """Pictures and a question about each in one of the forms that are read; returns what to pass, and options."""
    names = [name_of(index) for index in range(NUMBER)]
    questions = [f"is there a {('seven', 'three')[index % 2]} ?" for index in range(NUMBER)]
    images = [{"bytes": (folder / name).read_bytes(), "path": None} for name in names]
    if kind == "txt":
        text = "".join(f"{name}\t{question}\n" for name, question in zip(names, questions))
        (tmp_path / "list.txt").write_text(text)
        return tmp_path / "list.txt", ("--image-dir", folder)
    if kind == "jsonl":
        rows = [{"path": str(folder / name), "question": question} for name, question in zip(names, questions)]
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "list.jsonl", ("--image-dir", folder)
    if kind == "csv":
        lines = [f'{index},{folder / name},"{questions[index]}"\n' for index, name in enumerate(names)]
        (tmp_path / "list.csv").write_text("id,where,question\n" + "".join(lines))
        return tmp_path / "list.csv", ("--columns", "image=where", "--image-dir", folder)
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
        from pyarrow import parquet

        for part, rows in enumerate((slice(0, 5), slice(5, None))):
            table = pyarrow.table({"image": images[rows], "question": questions[rows]})
            parquet.write_table(table, tmp_path / f"rows-{part}.parquet", row_group_size=3)
        return tmp_path / "rows-*.parquet", ()
    if kind == "tar":
        pytest.importorskip("webdataset", reason="needs webdataset")
        for part, rows in enumerate((range(4), range(4, NUMBER))):
            members = {}
            for index in rows:
                members[f"{index:04d}.png"] = images[index]["bytes"]
                members[f"{index:04d}.json"] = json.dumps({"question": questions[index]}).encode()
            write_tar(tmp_path / f"s-{part}.tar", members)
        return tmp_path / "s-{0..1}.tar", ()
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": images, "question": questions}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved", ()


@pytest.fixture(scope="module")
def answers(models, folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("answers")
    images, options = write_source("jsonl", folder, tmp_path)
    result = invoke("ask", models["vqa"], images, tmp_path / "a.jsonl", *options, "--workers", 0, "--batch-size", 1)
    assert result.exit_code == 0, result.stderr
    rows = read_rows(tmp_path / "a.jsonl")
    assert len({row["answer"] for row in rows}) > 2
    return [(row["question"], row["answer"]) for row in rows]


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet", "tar", "datasets"])
def test_all_sources_give_the_same_answers(models, folder, answers, tmp_path, kind):
    images, options = write_source(kind, folder, tmp_path)
    result = invoke("ask", models["vqa"], images, tmp_path / "a.parquet", *options, "--batch-size", 4, "--workers", 2)
    assert result.exit_code == 0, result.stderr
    rows = read_rows(tmp_path / "a.parquet")
    assert [(row["question"], row["answer"]) for row in rows] == answers
    keys = {"txt": name_of, "tar": "{:04d}".format}.get(kind, str)
    assert [row["key"] for row in rows] == [keys(index) for index in range(NUMBER)]


def test_one_question_for_all_images(models, folder, tmp_path):
    question = "how many sevens are there ?"
    result = invoke("ask", models["vqa"], folder, tmp_path / "a.jsonl", "--question", question, "--workers", 0)
    assert result.exit_code == 0, result.stderr
    assert {row["question"] for row in read_rows(tmp_path / "a.jsonl")} == {question}
    # One row without a question is listed; without any, there is nothing to ask.
    rows = [{"path": str(folder / name_of(index)), "question": question if index else None} for index in range(3)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("ask", models["vqa"], tmp_path / "list.jsonl", tmp_path / "b.jsonl", "--image-dir", folder)
    assert result.exit_code == 3 and len(read_rows(tmp_path / "b.jsonl")) == 2
    (error,) = read_rows(tmp_path / "b.errors.jsonl")
    assert error["row"] == 0 and error["error"] == "the row has no question"
    result = invoke("ask", models["vqa"], folder, tmp_path / "c.jsonl", "--workers", 0)
    assert result.exit_code == 1 and "has no questions: pass --question" in result.stderr
    assert not list(tmp_path.glob("c.*"))


def test_it_is_no_success_if_every_row_failed(models, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("broken")
    result = caption(models, tmp_path / "images", tmp_path / "c.jsonl", "--workers", 0)
    assert result.exit_code == 3 and "c.jsonl: 0 images" in result.stdout and "1 errors, listed in" in result.stdout
    again = caption(models, tmp_path / "images", tmp_path / "c.jsonl", "--workers", 0)
    assert again.exit_code == 3 and "all done before, 1 errors" in again.stdout


def test_any_range_of_a_source_is_the_same_rows(folder, tmp_path):
    for kind in ("parquet", "tar", "datasets"):
        source = open_rows(write_source(kind, folder, tmp_path)[0])
        rows = list(source.rows(0, len(source)))
        assert [row.index for row in rows] == list(range(NUMBER))
        for start, stop in ((4, 7), (7, 9), (0, 2), (1, 9), (8, 9), (3, 3)):
            assert list(source.rows(start, stop)) == rows[start:stop]


def test_prompts_are_not_in_the_output_and_sampling_repeats(models, folder, tmp_path):
    texts = {}
    for name, options in {
        "plain": (),
        "prompted": ("--prompt", "the image of"),
        "beams": ("--num-beams", 3),
        "drawn": ("--do-sample", "--temperature", 2.0),
        "again": ("--do-sample", "--temperature", 2.0),
        "other": ("--do-sample", "--temperature", 2.0, "--seed", 1),
    }.items():
        result = caption(models, folder, tmp_path / f"{name}.jsonl", "--workers", 0, *options)
        assert result.exit_code == 0, result.stderr
        texts[name] = [row["caption"] for row in read_rows(tmp_path / f"{name}.jsonl")]
    assert texts["plain"] != texts["prompted"] and not any(
        text.startswith("the image of") for text in texts["prompted"]
    )
    assert texts["drawn"] == texts["again"] != texts["other"]
    assert len({tuple(texts[name]) for name in ("plain", "beams", "drawn")}) == 3


def test_bad_requests_are_one_line_and_write_nothing(models, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "kept.jsonl").write_text("kept")
    (tmp_path / "list.csv").write_text("where,what\na.png,b\n")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "o.jsonl"
    for arguments, message in (
        ((tmp_path / "nowhere", out), "There is no .*nowhere: expected a folder of images"),
        ((tmp_path / "empty", out), "empty holds no image"),
        (
            (tmp_path / "list.csv", out),
            "has no column image or .*: it has where, what; pass --columns image=NAME",
        ),
        ((folder, tmp_path / "o.txt"), r"expected a name that ends in .parquet, .jsonl or .csv, or --suffix .txt"),
        ((folder, tmp_path / "kept.jsonl"), "kept.jsonl exists, .* or pass --force"),
        ((folder, out, "--temperature", 2.0), "--temperature has no effect without --do-sample"),
        ((folder, tmp_path / "kept.jsonl" / "o.jsonl"), "o.jsonl can't be written .* is not a directory.*: choose"),
        ((folder, out, "--reduction", 0.9), "--reduction 0.9 is outside"),
        ((folder, out, "--prompt", "the image " * 20), "fills the decoder's length"),
        ((folder, tmp_path / "t", "--suffix", "txt"), "--suffix txt: expected a suffix with its dot"),
    ):
        result = invoke("caption", models["captioning"], *arguments, "--workers", 0)
        assert result.exit_code == 1 and result.stdout == "", result.output
        assert re.fullmatch(f"madtp-hf: .*{message}.*\n", result.stderr), result.stderr
        assert sorted(tmp_path.rglob("*")) == before
    result = invoke("ask", models["captioning"], folder, out, "--question", "what ?")
    assert result.exit_code == 1 and "for 'captioning', and the task is 'vqa'" in result.stderr


def test_help_fits_a_screen():
    for name in ("caption", "ask"):
        shown = (
            CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}).stdout
        )
        assert len(shown.splitlines()) <= 45 and "--max-new-tokens" in shown


# Going on after a stop


def start(arguments, processes=1, **environment):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, code=0) -> str:
    try:
        printed, errors = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, errors[-3000:]
    return printed


@pytest.fixture(scope="module")
def many(models, tmp_path_factory):
    """Many pictures, one of them broken, and their captions without a stop."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "images").mkdir()
    for index in range(700):
        copy = folder / "images" / f"{index:03d}.png"
        copy.write_bytes(encoded(picture(index % 50), "PNG"))
    (folder / "images" / "300.png").write_text("broken")
    result = caption(models, folder / "images", folder / "whole.jsonl", "--workers", 0)
    assert result.exit_code == 3, result.stderr
    return folder / "images", folder / "whole.jsonl"


COMMAND = ("-m", "madtp_hf_cli", "caption")
OPTIONS = ("--reduction", 0.5, "--max-new-tokens", 6)


@pytest.mark.slow
def test_stopped_it_goes_on_and_with_other_processes_too(models, many, tmp_path):
    """SIGTERM to one process in the middle; two go on, each with rows of its own."""
    images, whole = many
    out = tmp_path / "c.jsonl"
    process = start([*COMMAND, models["captioning"], images, out, *OPTIONS, "--batch-size", 1, "--workers", 0])
    while process.poll() is None and "s/it" not in (shown := process.stderr.read(1)) and shown != "%":
        pass
    time.sleep(1)
    process.terminate()
    _, errors = process.communicate()
    kept = re.search(r"Stopped: (\d+) of 700 rows are kept. Run the same command again to resume", errors)
    assert process.returncode == 130 and kept and 0 < int(kept[1]) < 700, errors
    assert not out.exists()
    other = caption(models, images, out, "--num-beams", 2)
    assert other.exit_code == 1 and "started with other settings: --num-beams was 1, now 2" in other.stderr

    # The launcher fails, for one of its processes has said that some rows have no result.
    printed = finish(start([*COMMAND, models["captioning"], images, out, *OPTIONS], processes=2), 1)
    assert printed.count("c.jsonl: 699 images") == 1 and "of them now" in printed and "1 errors" in printed
    assert out.read_bytes() == whole.read_bytes()
    assert [row["key"] for row in read_rows(tmp_path / "c.errors.jsonl")] == ["300.png"]
    again = caption(models, images, out)
    assert "699 images, all done before" in again.stdout and out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_ray_gives_the_same_rows(models, many, tmp_path):
    pytest.importorskip("ray.data", reason="needs ray[data]")
    images, whole = many
    out = tmp_path / "c.jsonl"
    # Ray keeps files in the home folder, and takes its time on a machine that has other things to do.
    environment = {"HOME": str(tmp_path), "RAY_raylet_start_wait_time_s": "120"}
    printed = finish(start([*COMMAND, models["captioning"], images, out, *OPTIONS, "--ray", 2], **environment), 3)
    assert "699 images" in printed and "1 errors" in printed
    assert out.read_bytes() == whole.read_bytes()
