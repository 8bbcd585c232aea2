"""Captions as COCO and Kaggle ship them, and Hub data sets whose split is a column or whose captions are strings."""

import json
import warnings

import datasets
import pytest
from PIL import Image

from madtp_hf.data import load_coco_captions, load_flickr30k, load_vqav2

from .test_readers import draw, red, refused, stored, write


@pytest.fixture
def coco(tmp_path):
    """COCO as its zip files unpack: `annotations/` beside the folders of images."""

    def document(prefix, folder):
        images = [
            {
                "id": number,
                "file_name": f"{prefix}{number:012d}.jpg",
                "coco_url": f"http://images.cocodataset.org/{folder}/x.jpg",
                "license": 3,
            }
            for number in (9, 25)
        ]
        for image in images:
            draw(tmp_path / folder / image["file_name"], image["id"])
        captions = [(25, "A giraffe.\n"), (9, "food"), (25, "Two giraffes.")]
        annotations = [{"image_id": image, "id": 7, "caption": caption} for image, caption in captions]
        return {"info": {}, "licenses": [], "images": images, "annotations": annotations}

    for name, prefix in (("train2014", "COCO_train2014_"), ("val2014", "COCO_val2014_"), ("val2017", "")):
        write(tmp_path / "annotations" / f"captions_{name}.json", document(prefix, name))
    return tmp_path


def test_coco_official(coco):
    dataset = load_coco_captions(coco, "train")
    assert dataset["captions"][:] == [["A giraffe.", "Two giraffes."], ["food"]]
    assert dataset["image_id"][:] == ["25", "9"]
    assert stored(dataset)[0] == coco / "train2014" / "COCO_train2014_000000000025.jpg"
    of_2017 = load_coco_captions(coco / "annotations" / "captions_val2017.json", "validation")
    assert stored(of_2017)[1] == coco / "val2017" / "000000000009.jpg"
    file = (coco / "annotations" / "captions_val2017.json").rename(coco / "mine.json")
    assert stored(load_coco_captions(file, "val", image_dir=coco)) == stored(of_2017)
    with refused(FileNotFoundError, "captions_test2014.json"):
        load_coco_captions(coco, "test")


def test_coco_official_errors(coco):
    file = coco / "annotations" / "captions_val2014.json"
    with refused(ValueError, file, "is for the split 'val': expected 'train'"):
        load_coco_captions(file, "train")
    good = json.loads(file.read_text())
    for key, fields, pieces in (
        ("annotations", {"image_id": 3}, ["annotations, entry 1", "image_id 3", "not one of the file's images"]),
        ("annotations", {"caption": None}, ["annotations, entry 1", "'caption'", "expected a string"]),
        ("images", {"id": "9"}, ["images, entry 1", "'id'", "a whole number"]),
    ):
        entries = [{**good[key][0], **fields}, *good[key][1:]]
        write(file, {**good, key: entries})
        with refused(ValueError, file, *pieces):
            load_coco_captions(coco, "val")
    write(file, {**good, "annotations": good["annotations"][:1]})
    with refused(ValueError, file, "images, entry 1", "the image 9 has no caption"):
        load_coco_captions(coco, "val")


@pytest.fixture
def kaggle(tmp_path):
    """Flickr30k as Kaggle's zip file unpacks."""
    for number in (10, 21):
        draw(tmp_path / "flickr30k_images" / f"{number}.jpg", number)
    lines = ["image_name| comment_number| comment", "10.jpg| 0| Two men , outside .", "21.jpg| 0| A dog | runs ."]
    return write(tmp_path / "results.csv", "\n".join([*lines, "10.jpg| 4   A dog runs .", "10.jpg| 1|  Men ."]) + "\n")


def test_flickr30k_kaggle(kaggle):
    with refused(
        ValueError, f"{kaggle}, line 4", "<image>| <number>| <caption>", "10.jpg| 4   A dog", "on_error='skip'"
    ):
        load_flickr30k(kaggle, "all")
    with pytest.warns(UserWarning, match="line 4.*'10.jpg| 4   A dog runs .'; it is left out"):
        dataset = load_flickr30k(kaggle.parent, "all", on_error="skip")
    assert dataset["captions"][:] == [["Two men , outside .", "Men ."], ["A dog | runs ."]]
    assert dataset["image_id"][:] == ["10", "21"]
    assert stored(dataset)[1] == kaggle.parent / "flickr30k_images" / "21.jpg"
    with refused(ValueError, kaggle, "has no splits", "split='all'"):
        load_flickr30k(kaggle, "train")
    with refused(ValueError, "on_error='ignore'", "'raise' or 'skip'"):
        load_flickr30k(kaggle, "all", on_error="ignore")


def test_a_sound_file_gives_no_warning(kaggle):
    kaggle.write_text(kaggle.read_text().replace("10.jpg| 4   A", "10.jpg| 4|  A"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_flickr30k(kaggle, "all", on_error="skip")["captions"][0][1] == "A dog runs ."


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A data set with all splits in one, as nlphuji/flickr30k has them."""
    for number in (3, 4, 5):
        Image.new("RGB", (4, 4), (number * 30, 0, 0)).save(tmp_path / f"{number}.png")
    columns = {
        "image": [str(tmp_path / f"{number}.png") for number in (3, 4, 5)],
        "caption": [["a", "b"], ["c"], ["d", "e"]],
        "one": ["a", "c", "d"],
        "split": ["train", "test", "train"],
        "img_id": [3, 4, 5],
    }
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: dataset)


def test_a_hub_data_set_whose_split_is_a_column(hub):
    columns = {"captions": "caption", "image_id": "img_id"}
    dataset = load_flickr30k("org/set", "test", columns=columns, where={"split": "train"})
    assert dataset["captions"][:] == [["a", "b"], ["d", "e"]] and dataset["image_id"][:] == ["3", "5"]
    assert [red(row["image"]) for row in dataset] == [90, 150]
    with refused(ValueError, "org/set", "no row", "'dev'", "['test', 'train']"):
        load_coco_captions("org/set", "test", columns=columns, where={"split": "dev"})
    with refused(ValueError, "org/set", "no column part"):
        load_coco_captions("org/set", "test", columns=columns, where={"part": "dev"})


def test_questions_of_a_hub_data_set_whose_split_is_a_column(hub):
    columns = {"question": "one", "question_id": "img_id", "answers": "caption"}
    dataset = load_vqav2("org/set", "all", columns=columns, where={"split": "test"})
    assert (dataset["question"][:], dataset["question_id"][:], dataset["answers"][:]) == (["c"], [4], [["c"]])


def test_a_hub_data_set_with_a_caption_a_row(hub):
    dataset = load_flickr30k(
        "org/set", "test", columns={"captions": "one", "image_id": "img_id"}, where={"split": "test"}
    )
    assert dataset.column_names == ["image", "captions", "image_id"]
    assert (dataset[0]["captions"], red(dataset[0]["image"])) == (["c"], 120)


def test_where_is_for_the_hub(kaggle):
    with refused(ValueError, "`where` is for data sets on the Hub"):
        load_flickr30k(kaggle, "all", where={"split": "train"})
