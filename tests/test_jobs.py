"""What a job keeps of an earlier run, and what it does again: by its settings, its rows and its output."""

import csv
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner


pytest.importorskip("pyarrow", reason="jobs need the extra `jobs`")
import pyarrow
import pyarrow.parquet
from transformers import AutoModel, BlipForConditionalGeneration

from madtp_hf import jobs
from madtp_hf.jobs import workers
from madtp_hf_cli import app

from .conftest import blip_config, make_processor, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor
from .test_bulk import encoded, picture, read_rows, save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {task: save_model(task, folder / task) for task in ("captioning", "vqa", "retrieval")}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        picture(index).save(folder / f"{index}.png")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments), "--workers", "0"])


def run(command, model, images, out, *options, code=0):
    result = invoke(command, model, images, out, *options)
    assert result.exit_code == code, result.output
    return result


def caption(models, images, out, *options, code=0):
    return run("caption", models["captioning"], images, out, "--max-new-tokens", 4, *options, code=code)


def captions_of(out) -> dict:
    return {row["key"]: row["caption"] for row in read_rows(out)}


@pytest.fixture
def computed(monkeypatch):
    """The rows whose results are computed."""
    rows = []

    def noted(worker, batch, of=workers.Worker.__call__):
        rows.extend(batch.rows)
        return of(worker, batch)

    monkeypatch.setattr(workers.Worker, "__call__", noted)
    return rows


# Settings


def test_a_dense_blip_goes_on(photos, tmp_path, computed):
    """Its alignment tokens are random in each run, and have no effect."""
    torch.manual_seed(3)
    BlipForConditionalGeneration(blip_config()).save_pretrained(tmp_path / "dense")
    make_processor().save_pretrained(tmp_path / "dense")
    model, out = tmp_path / "dense", tmp_path / "c.jsonl"
    run("caption", model, photos, out, "--max-new-tokens", 3)
    torch.manual_seed(4)
    assert "all done before" in run("caption", model, photos, out, "--max-new-tokens", 3).stdout
    assert computed == [*range(6)]


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda model: edit(model / "processor_config.json", "image_mean", [0.5, 0.5, 0.5]), "image_mean was"),
        (lambda model: edit(model / "processor_config.json", "resample", 2), "resample was 3, now 2"),
        (
            lambda model: edit(model / "generation_config.json", "repetition_penalty", 1.5),
            "repetition_penalty was None",
        ),
        (lambda model: edit(model / "generation_config.json", "temperature", 0.5), "temperature was None, now 0.5"),
        (lambda model: edit(model / "config.json", "pruning_temperature", 3.0), "pruning_method was None"),
        (lambda model: edit(model / "config.json", "hidden_act", "relu"), "weights was"),
    ],
)
def test_what_changes_results_is_noticed_and_named(models, photos, tmp_path, change, named):
    model, out = tmp_path / "model", tmp_path / "c.jsonl"
    shutil.copytree(models["captioning"], model)
    run("caption", model, photos, out, "--max-new-tokens", 3)
    change(model)
    result = run("caption", model, photos, out, "--max-new-tokens", 3, code=1)
    assert "was started with other settings: " in result.stderr and named in result.stderr
    run("caption", model, photos, out, "--max-new-tokens", 3, "--force")


def edit(file, name, value):
    """Set a field wherever it is in a JSON file, else at its top."""
    content = json.loads(file.read_text())

    def set_in(part):
        found = name in part
        if found:
            part[name] = value
        return any([found, *(set_in(inner) for inner in part.values() if isinstance(inner, dict))])

    if not set_in(content):
        content[name] = value
    file.write_text(json.dumps(content))


def test_a_reduction_left_out_is_that_of_the_checkpoint_and_zero_is_off(models, photos, tmp_path):
    model = make_task_model("captioning", {"pruning_schedule": [[0.5, 3.0]]})
    model.set_pruning(reduction=0.5)
    model.save_pretrained(tmp_path / "pruned")
    make_processor().save_pretrained(tmp_path / "pruned")
    outs = {}
    for name, options, note in (
        ("saved", (), "as saved (madtp, temperature 3"),
        ("half", ("--reduction", 0.5), "reduction 0.5 (madtp, temperature 3"),
        ("off", ("--reduction", 0), "reduction 0 (off)"),
    ):
        outs[name] = tmp_path / f"{name}.jsonl"
        result = run("caption", tmp_path / "pruned", photos, outs[name], "--max-new-tokens", 4, *options)
        assert f"pruning: {note}" in result.stdout
        manifest = json.loads((tmp_path / f"{name}.jsonl.job" / "manifest.json").read_text())
        assert manifest["pruning"].startswith(note) and manifest["reduction"] == (options[1] if options else None)
    assert captions_of(outs["saved"]) == captions_of(outs["half"])
    run("caption", models["captioning"], photos, tmp_path / "dense.jsonl", "--max-new-tokens", 4)
    assert captions_of(outs["off"]) == captions_of(tmp_path / "dense.jsonl")


# Rows


def test_new_changed_and_removed_images(models, photos, tmp_path, computed):
    out = tmp_path / "c.parquet"
    caption(models, photos, out)
    before = captions_of(out)
    computed.clear()
    picture(7).save(photos / "2.png")  # another content under its name
    picture(8).save(photos / "9.png")
    (photos / "0.png").unlink()
    result = caption(models, photos, out)
    assert computed == [1, 5] and "6 images, 2 of them now" in result.stdout
    after = captions_of(out)
    assert [*after] == ["1.png", "2.png", "3.png", "4.png", "5.png", "9.png"]
    assert {name for name in before if before[name] != after.get(name)} == {"0.png", "2.png"}
    fresh = tmp_path / "fresh.parquet"
    caption(models, photos, fresh)
    assert captions_of(fresh) == after


def test_a_parquet_file_that_was_replaced_is_read_again(models, tmp_path, computed):
    table, out = tmp_path / "t.parquet", tmp_path / "c.jsonl"

    def write(first):
        images = [encoded(picture(index), "BMP") for index in range(first, first + 3)]
        pyarrow.parquet.write_table(pyarrow.table({"image": images}), table, compression="none", use_dictionary=False)
        return table.stat().st_size

    size = write(0)
    caption(models, table, out)
    time.sleep(0.01)
    assert write(10) == size
    caption(models, table, out)
    assert computed == [0, 1, 2] * 2


def test_failures_alone_are_tried_again(models, photos, tmp_path, computed):
    out = tmp_path / "c.jsonl"
    good = (photos / "3.png").read_bytes()
    stamp = os.stat(photos / "3.png")
    (photos / "3.png").write_bytes(b"x" * len(good))
    os.utime(photos / "3.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert "5 images" in caption(models, photos, out, code=3).stdout
    (photos / "3.png").write_bytes(good)  # such as a disk that was not there
    os.utime(photos / "3.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    computed.clear()
    assert "all done before, 1 errors" in caption(models, photos, out, code=3).stdout
    assert "6 images, 1 of them now" in caption(models, photos, out, "--retry-errors").stdout
    assert computed == [3] and not (tmp_path / "c.errors.jsonl").exists() and len(captions_of(out)) == 6


def test_another_source_is_refused_and_a_moved_one_goes_on(models, photos, tmp_path, computed):
    out, other = tmp_path / "c.jsonl", tmp_path / "other"
    caption(models, photos, out)
    other.mkdir()
    picture(9).save(other / "a.png")
    result = caption(models, other, out, code=1)
    assert f"is of {photos}, and none of its rows is in {other}" in result.stderr
    photos.rename(tmp_path / "moved")
    assert "all done before" in caption(models, tmp_path / "moved", out).stdout
    assert "1 images, " in caption(models, other, out, "--force").stdout


def test_equal_rows_are_computed_once_and_written_each(models, photos, tmp_path, computed):
    (photos / "list.txt").write_text("1.png\n2.png\n1.png\n")
    caption(models, photos / "list.txt", tmp_path / "c.jsonl")
    assert computed == [0, 1]
    rows = read_rows(tmp_path / "c.jsonl")
    assert [row["key"] for row in rows] == ["1.png", "2.png", "1.png"] and rows[0]["caption"] == rows[2]["caption"]


# Output


def test_side_files_that_the_job_has_not_written_are_kept(models, photos, tmp_path, computed):
    (photos / "1.txt").write_text("my own words")
    for _ in range(2):
        result = caption(models, photos, photos, "--suffix", ".txt", code=3)
        assert "5 images" in result.stdout and "1 errors" in result.stdout
        assert (photos / "1.txt").read_text() == "my own words"
    assert computed == [0, 2, 3, 4, 5]
    (error,) = read_rows(tmp_path / "photos.errors.jsonl")
    assert error["key"] == "1.png" and "1.txt exists, and this job has not written it" in error["error"]
    (photos / "2.txt").write_text("edited")
    caption(models, photos, photos, "--suffix", ".txt", code=3)
    assert (photos / "2.txt").read_text() == "edited" and len(read_rows(tmp_path / "photos.errors.jsonl")) == 2
    (photos / "3.txt").unlink()  # written again, from what is known
    picture(7).save(photos / "4.png")  # whose text the job may replace
    before = (photos / "4.txt").read_text()
    computed.clear()
    caption(models, photos, photos, "--suffix", ".txt", code=3)
    assert computed == [4] and (photos / "3.txt").is_file() and (photos / "4.txt").read_text() != before
    caption(models, photos, photos, "--suffix", ".txt", "--force")
    assert (photos / "1.txt").read_text() not in ("my own words", "edited")


def test_side_files_of_keys_that_are_equal_or_lead_out(models, tmp_path):
    images = [encoded(picture(index), "PNG") for index in range(4)]
    table = pyarrow.table({"id": ["a", "a", "b", "../../x"], "image": images})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    result = caption(models, tmp_path / "t.parquet", tmp_path / "texts", "--suffix", ".txt", code=3)
    assert "2 images" in result.stdout and "2 errors" in result.stdout
    assert sorted(path.name for path in (tmp_path / "texts").iterdir()) == ["a.txt", "b.txt"]
    errors = read_rows(tmp_path / "texts.errors.jsonl")
    assert [(row["row"], row["error"].partition(" /")[0]) for row in errors] == [
        (1, "its text file is that of a"),
        (3, "its text file would lie outside of"),
    ]


@pytest.mark.parametrize(
    "spoil", [lambda out: out.write_bytes(out.read_bytes()[:-9]), lambda out: out.write_text("{}")]
)
def test_an_output_that_was_changed_is_named_and_written_again_once_moved(models, photos, tmp_path, computed, spoil):
    out = tmp_path / "c.jsonl"
    caption(models, photos, out)
    whole = out.read_bytes()
    spoil(out)
    spoiled = out.read_bytes()
    result = caption(models, photos, out, code=1)
    assert "c.jsonl has changed since the job wrote it. Move it elsewhere" in result.stderr
    assert out.read_bytes() == spoiled
    out.rename(tmp_path / "mine.jsonl")
    computed.clear()
    assert "all done before" in caption(models, photos, out).stdout
    assert out.read_bytes() == whole and not computed


def test_csv_has_the_same_rows(models, photos, tmp_path):
    caption(models, photos, tmp_path / "c.csv")
    caption(models, photos, tmp_path / "c.jsonl")
    with open(tmp_path / "c.csv", newline="") as lines:
        rows = [*csv.DictReader(lines)]
    assert [{**row, "row": int(row["row"])} for row in rows] == read_rows(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    "damage",
    [
        lambda job: (job / "manifest.json").write_bytes(b"\xff\xfe"),
        lambda job: (job / "manifest.json").write_text("{}"),
        lambda job: (job / "manifest.json").write_text("[]"),
        lambda job: edit(job / "manifest.json", "outputs", [["many", 1]]),
        lambda job: next(job.glob("part-*")).write_bytes(b"ARROW1"),
        lambda job: rewrite(next(job.glob("part-*")), {"id": [1], "error": ["x"]}),
        lambda job: rewrite(next(job.glob("part-*")), {}),
    ],
)
def test_a_damaged_state_is_named_and_can_be_started_over(models, photos, tmp_path, damage):
    out = tmp_path / "c.jsonl"
    caption(models, photos, out)
    before = out.read_bytes()
    damage(tmp_path / "c.jsonl.job")
    result = caption(models, photos, out, code=1)
    assert "c.jsonl.job/" in result.stderr and "is damaged" in result.stderr and "--force" in result.stderr
    assert result.stderr.count("\n") == 1 and out.read_bytes() == before
    caption(models, photos, out, "--force")
    assert out.read_bytes() == before


def rewrite(part, columns):
    """Write a part without results, under the name that its content should have."""
    from madtp_hf.jobs.state import _digest

    table = pyarrow.table(columns)
    with pyarrow.ipc.new_file(str(part), table.schema) as writer:
        writer.write_table(table)
    part.rename(part.with_name(f"{part.stem.rpartition('-')[0]}-{_digest(part)}.arrow"))


def test_names_that_are_not_utf8_lose_nothing(models, photos, tmp_path):
    shutil.copy(photos / "1.png", os.path.join(os.fsencode(photos), b"\xff.png"))
    shutil.copy(photos / "1.png", os.path.join(os.fsencode(photos), b"\xfe.png"))
    with open(os.path.join(os.fsencode(photos), b"\xfe.png"), "wb") as file:
        file.write(b"broken")
    for name in ("c.parquet", "c.jsonl", "c.csv"):
        caption(models, photos, tmp_path / name, code=3)
    assert read_rows(tmp_path / "c.jsonl")[-1]["key"] == "\\xff.png"
    assert [row["key"] for row in read_rows(tmp_path / "c.errors.jsonl")] == ["\\xfe.png"]


def test_half_of_a_surrogate_pair_in_an_id_loses_nothing(models, photos, tmp_path):
    (photos / "list.jsonl").write_text('{"id": "a\\ud800", "image": "1.png"}\n{"id": "b", "image": "\\ud800.png"}\n')
    for name in ("c.parquet", "c.jsonl"):
        assert "1 images" in caption(models, photos / "list.jsonl", tmp_path / name, code=3).stdout
        assert [*captions_of(tmp_path / name)] == ["a\ufffd"]
        assert "no such file" in read_rows(tmp_path / "c.errors.jsonl")[0]["error"]


# Stops


def test_ctrl_c_keeps_what_is_computed_and_says_how_much(models, photos, tmp_path, monkeypatch, computed):
    def stops(worker, batch, of=workers.Worker.__call__):
        if len(computed) == 4:
            raise KeyboardInterrupt
        return of(worker, batch)

    out = tmp_path / "c.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(workers.Worker, "__call__", stops)
        result = caption(models, photos, out, "--batch-size", 2, code=130)
    assert "Stopped: 4 of 6 rows are kept. Run the same command again to resume." in result.stderr
    assert not out.exists()
    assert "6 images, 2 of them now" in caption(models, photos, out).stdout and computed == [*range(6)]


def test_results_are_saved_by_time(models, photos, tmp_path):
    worker = jobs.Writer.load(models["captioning"], None, jobs.Generation(max_new_tokens=2), device="cpu")
    reader = jobs.Reader(jobs.open_rows(photos), worker.processor.image_processor)
    output, parts = jobs.make_output(tmp_path / "c.jsonl"), []

    def slow(batch, of=worker):
        parts.append(len(list((tmp_path / "c.jsonl.job").glob("part-*"))))
        time.sleep(0.05)
        return of(batch)

    options = {"batch_size": 1, "num_workers": 0, "show_progress": False}
    worker.__class__ = type(
        "Slow", (jobs.Writer,), {"__call__": lambda self, batch: slow(batch, super(type(self), self).__call__)}
    )
    jobs.run_job(reader, worker, output, save_interval=0.0, **options)
    assert parts == [*range(6)]
    parts.clear()
    jobs.run_job(reader, worker, output, save_interval=60.0, force=True, **options)
    assert parts == [0] * 6


# Embeddings and scores


def test_embeddings_of_images_and_texts_and_scores_of_pairs(models, photos, tmp_path):
    def pooled(output):
        return getattr(output, "pooler_output", output)[0]

    model = AutoModel.from_pretrained(models["retrieval"]).eval()
    processor = make_processor()
    run("embed", models["retrieval"], photos, tmp_path / "e.parquet")
    rows = read_rows(tmp_path / "e.parquet")
    (tmp_path / "texts.txt").write_text("a seven\nwhat color\n")
    run("embed", models["retrieval"], tmp_path / "texts.txt", tmp_path / "t.jsonl", "--texts")
    texts = read_rows(tmp_path / "t.jsonl")
    assert [row["text"] for row in texts] == ["a seven", "what color"]
    lines = [f'{{"image": "{index}.png", "caption": "{"a seven" if index % 2 else ""}"}}\n' for index in range(6)]
    (photos / "pairs.jsonl").write_text("".join(lines))
    scored = run("embed", models["retrieval"], photos / "pairs.jsonl", tmp_path / "s.csv", "--scores", code=3)
    assert "3 images" in scored.stdout and "3 errors" in scored.stdout
    run("embed", models["retrieval"], photos, tmp_path / "all.jsonl", "--scores", "--text", "what color")
    with torch.no_grad():
        for index in range(6):
            pixels = processor.image_processor(picture(index), return_tensors="pt").pixel_values
            features = pooled(model.get_image_features(pixels))
            np.testing.assert_allclose(rows[index]["embedding"], features.numpy(), atol=1e-5)
            text = processor.tokenizer(["what color"], return_tensors="pt")
            logits = model(text.input_ids, pixels, attention_mask=text.attention_mask).itm_score
            score = read_rows(tmp_path / "all.jsonl")[index]["score"]
            assert score == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)
        text = processor.tokenizer(["a seven"], return_tensors="pt")
        features = pooled(model.get_text_features(text.input_ids, text.attention_mask))
        np.testing.assert_allclose(texts[0]["embedding"], features.numpy(), atol=1e-5)
    result = invoke("embed", models["captioning"], photos, tmp_path / "x.parquet")
    assert result.exit_code == 1 and "for 'captioning', and the task is 'retrieval' or 'clip'" in result.stderr


def test_an_embedding_that_is_not_a_number_is_listed(photos, tmp_path):
    model = make_clip_model()
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "clip")
    make_clip_processor().save_pretrained(tmp_path / "clip")
    result = run("embed", tmp_path / "clip", photos, tmp_path / "e.parquet", code=3)
    assert "0 images" in result.stdout and "6 errors" in result.stdout
    assert {row["error"] for row in read_rows(tmp_path / "e.errors.jsonl")} == {"the model's result is not a number"}
