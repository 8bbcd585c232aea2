"""Tables of one's own: CSV, JSON lines and Parquet as rows for the collators."""

import json

import datasets
import pytest
from PIL import Image

from madtp_hf.data import (
    CaptioningCollator,
    QuestionAnsweringCollator,
    RetrievalCollator,
    VisualReasoningCollator,
    load_table,
)

from .conftest import make_processor


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(4):
        Image.new("RGB", (6, 6), (index * 20, 0, 0)).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path


def write(path, text):
    path.write_text(text)
    return path


def red(image):
    return image.convert("RGB").getpixel((0, 0))[0]


def test_a_csv_with_a_caption_a_row(folder):
    file = write(
        folder / "captions.csv",
        'image,caption,split\nphotos/1.png,"a dog, red",train\nphotos/0.png,a cat,train\nphotos/1.png,NA,train\n'
        "photos/2.png,a cow,test\n",
    )
    dataset = load_table(file, "captioning", where={"split": "train"})
    assert dataset["captions"][:] == [["a dog, red", "NA"], ["a cat"]]
    assert [red(row["image"]) for row in dataset] == [20, 0]
    batch = CaptioningCollator(make_processor(), 38)(list(dataset))
    assert batch["pixel_values"].shape[0] == 2 and "labels" in batch
    with pytest.raises(ValueError, match=r"no row where .*'dev'.*\['test', 'train'\]"):
        load_table(file, "captioning", where={"split": "dev"})


def test_answers_that_are_numbers_stay_strings(folder):
    file = write(folder / "t.tsv", "file\tquestion\tanswer\n0.png\thow many?\t2\n1.png\twhich?\t007\n")
    dataset = load_table(file, "vqa", image_dir=folder / "photos", columns={"image": "file"})
    assert dataset["answers"][:] == [["2"], ["007"]]
    assert "labels" in QuestionAnsweringCollator(make_processor(), 38)(list(dataset))
    unanswered = load_table(file, "vqa", image_dir=folder / "photos", columns={"image": "file", "answers": "answer"})
    assert unanswered.column_names == ["image", "question", "answers"]
    write(file, "image\tquestion\n0.png\thow many?\n")
    assert load_table(file, "vqa", image_dir=folder / "photos").column_names == ["image", "question"]


def test_json_lines_of_two_images(folder):
    rows = [
        {
            "left_image": "photos/0.png",
            "right_image": str(folder / "photos/1.png"),
            "sentence": "is it?",
            "label": label,
        }
        for label in (True, False)
    ]
    file = write(folder / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    dataset = load_table(file, "nlvr2")
    assert dataset["label"][:] == [1, 0] and red(dataset[0]["right_image"]) == 20
    assert VisualReasoningCollator(make_processor())(list(dataset))["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_parquet_with_the_bytes_of_images(folder, form):
    contents = [(folder / "photos" / f"{index}.png").read_bytes() for index in range(3)]
    images = contents if form == "bytes" else [{"bytes": content, "path": None} for content in contents]
    for shard in range(2):
        columns = {"image": images, "captions": [["a", "b"]] * 3, "n": [0, 1, 2]}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"shard-{shard}.parquet")
    dataset = load_table(folder, "retrieval")
    assert len(dataset) == 6 and [red(row["image"]) for row in dataset] == [0, 20, 40] * 2
    assert dataset["image_id"][:] == list("123456")
    some = load_table([folder / "shard-0.parquet"], "retrieval", where={"n": 2}, columns={"image_id": "n"})
    assert (some["image_id"][:], red(some[0]["image"])) == (["2"], 40)
    assert RetrievalCollator(make_processor())(list(dataset))["image_ids"].unique().numel() == 6


def test_retrieval_knows_an_image_by_its_path(folder):
    file = write(folder / "c.csv", "image,caption\nphotos/0.png,a\nphotos/1.png,b\nphotos/0.png,c\n")
    dataset = load_table(file, "retrieval")
    assert dataset["captions"][:] == [["a", "c"], ["b"]]
    assert dataset["image_id"][:] == [str(folder / "photos/0.png"), str(folder / "photos/1.png")]


@pytest.mark.parametrize(
    "row, error, pieces",
    [
        ("photos/9.png,a cow", FileNotFoundError, "row 2: image: no file .*9.png"),
        ("photos/1.png,", ValueError, "row 2: no captions"),
        ("photos/1.png,a cow, brown", ValueError, "row 2: t.csv, line 3: 3 cells, expected 2.*quotes"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder, row, error, pieces):
    file = write(folder / "t.csv", f"image,caption\nphotos/0.png,a cat\n{row}\nphotos/2.png,a dog\n")
    with pytest.raises(error, match=pieces + ".*on_error='skip'"):
        load_table(file, "captioning")
    with pytest.warns(UserWarning, match="Left out 1 of the rows .*" + pieces.partition(".*")[0]):
        dataset = load_table(file, "captioning", on_error="skip")
    assert dataset["captions"][:] == [["a cat"], ["a dog"]]


def test_tables_that_will_not_do(folder):
    file = write(folder / "t.csv", "image,words\nphotos/0.png,a\n")
    for path, task, options, error, message in (
        (
            file,
            "captioning",
            {},
            ValueError,
            "no column captions or caption or text: it has image, words; pass columns=",
        ),
        (file, "captioning", {"columns": {"captions": "said"}}, ValueError, "no column said"),
        (file, "captioning", {"columns": {"question": "words"}}, ValueError, "question can't be chosen"),
        (
            file,
            "captioning",
            {"where": {"split": "a"}, "columns": {"captions": "words"}},
            ValueError,
            "no column split",
        ),
        (file, "caption", {}, ValueError, "task='caption'"),
        (folder / "none.csv", "vqa", {}, FileNotFoundError, "no file"),
        (folder / "photos", "vqa", {}, FileNotFoundError, "has no table"),
        (write(folder / "e.csv", ""), "vqa", {}, ValueError, "line 1: expected names"),
        (
            write(folder / "bad.jsonl", '{"image": '),
            "vqa",
            {},
            ValueError,
            "row that can be used .bad.jsonl, line 1: not JSON",
        ),
        (
            write(folder / "q.csv", 'image,question\n"a"b,c\n'),
            "vqa",
            {},
            ValueError,
            "row 1: q.csv, line 2 can't be read",
        ),
    ):
        with pytest.raises(error, match=message):
            load_table(path, task, **options)
