import json
import re
from pathlib import Path

import datasets
import pytest
from PIL import Image, UnidentifiedImageError

from madtp_hf.data.published import load_coco_captions, load_flickr30k, load_nlvr2, load_vqav2


READERS = {"nlvr2": load_nlvr2, "vqav2": load_vqav2, "coco": load_coco_captions, "flickr30k": load_flickr30k}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def draw(path, red=0):
    """A file at `path` whose one colour says which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (red, 0, 0)).save(path)


def write(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document, indent=1))
    return path


def write_lines(path, entries):
    return write(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def red(image):
    return image.convert("RGB").getpixel((0, 0))[0]


def stored(dataset, column="image"):
    """The paths of a column of images, none of them opened."""
    return [
        Path(image["path"]) for image in dataset.cast_column(column, datasets.Image(decode=False)).to_dict()[column]
    ]


def refused(error, *pieces):
    """A context that expects an error whose message has all these pieces, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(piece)) for piece in pieces))


# NLVR2


def nlvr2_entry(identifier, label="True", **fields):
    entry = {"identifier": identifier, "sentence": f"{identifier}?", "label": label, "synset": "acorn"}
    return entry | {"left_url": "http://a/l.png", "right_url": "http://a/r.png"} | fields


@pytest.fixture
def nlvr2(tmp_path):
    """The authors' files; train's images lie as downloaded, in images/train/, those of dev beside the file."""
    write_lines(
        tmp_path / "train.json",
        [
            nlvr2_entry("train-7-1-0", "False", directory=93),
            nlvr2_entry("train-7-0-0", directory=93),
            nlvr2_entry("train-8-0-1", directory=4),
        ],
    )
    write_lines(tmp_path / "dev.json", [nlvr2_entry("dev-850-0-0")])
    write_lines(tmp_path / "test1.json", [nlvr2_entry("test1-0-3-1", "False")])
    pairs = {"images/train/93/train-7-1": 10, "images/train/93/train-7-0": 20, "images/train/4/train-8-0": 30}
    for name, number in {**pairs, "dev/dev-850-0": 40, "test1-0-3": 50}.items():
        for side in (0, 1):
            draw(tmp_path / f"{name}-img{side}.png", number + side)
    return tmp_path


def test_nlvr2_official(nlvr2):
    dataset = load_nlvr2(nlvr2, "train")
    assert dataset.features == datasets.Features(
        {
            "left_image": datasets.Image(),
            "right_image": datasets.Image(),
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["False", "True"]),
            "identifier": datasets.Value("string"),
        }
    )
    assert dataset["identifier"][:] == ["train-7-1-0", "train-7-0-0", "train-8-0-1"]
    assert dataset["sentence"][0] == "train-7-1-0?"
    assert dataset["label"][:] == [0, 1, 1]
    assert [(red(row["left_image"]), red(row["right_image"])) for row in dataset] == [(10, 11), (20, 21), (30, 31)]


@pytest.mark.parametrize("split", ["validation", "dev"])
def test_nlvr2_from_a_file_and_with_an_image_folder(nlvr2, split):
    file = (nlvr2 / "dev.json").rename(write(nlvr2 / "elsewhere" / "mine.json", ""))
    dataset = load_nlvr2(str(file), split, image_dir=str(nlvr2))
    assert stored(dataset, "left_image") == [nlvr2 / "dev/dev-850-0-img0.png"]
    assert red(dataset[0]["right_image"]) == 41


@pytest.mark.parametrize("split", ["test", "test1"])
def test_nlvr2_images_directly_in_the_image_folder(nlvr2, split):
    assert stored(load_nlvr2(nlvr2, split), "right_image") == [nlvr2 / "test1-0-3-img1.png"]


def test_nlvr2_blip(nlvr2):
    def entry(pair, sentence, label):
        images = [f"images/train/93/{pair}-img{side}.png" for side in (0, 1)]
        return {"sentence": sentence, "label": label, "images": images}

    rows = [("train-7-1", "b", "True"), ("train-7-0", "a", "True"), ("train-7-0", "b", "False")]
    rows += [("train-7-0", "b", "False"), ("train-7-1", "b", "False")]  # another writer's sentence in the same words
    file = write(nlvr2 / "nlvr_train.json", [entry(*row) for row in rows])
    dataset = load_nlvr2(file, "train")
    # the same sentence about another pair of the set has the same last part, as in the authors' identifiers
    assert dataset["identifier"][:] == ["train-7-1-0", "train-7-0-1", "train-7-0-0", "train-7-0-2", "train-7-1-2"]
    assert dataset["sentence"][:] == ["b", "a", "b", "b", "b"]
    assert dataset["label"][:] == [1, 1, 0, 0, 0]
    assert [red(row["right_image"]) for row in dataset] == [11, 21, 21, 21, 11]

    # in a folder the authors' file comes first; the paths also hold below images/
    (nlvr2 / "train.json").unlink()
    write(file, file.read_text().replace("images/", ""))
    assert stored(load_nlvr2(nlvr2, "train"), "left_image") == stored(dataset, "left_image")


@pytest.mark.parametrize("split, name, pair", [("validation", "dev", "dev/dev-850-0"), ("test", "test", "test1-0-3")])
def test_nlvr2_blip_splits(nlvr2, split, name, pair):
    for official in ("dev", "test1"):
        (nlvr2 / f"{official}.json").unlink()
    images = [f"{pair}-img{side}.png" for side in (0, 1)]
    write(nlvr2 / f"nlvr_{name}.json", [{"sentence": "s", "label": "True", "images": images}])
    assert load_nlvr2(nlvr2, split)["identifier"][:] == [f"{Path(pair).name}-0"]


@pytest.mark.parametrize(
    "line, pieces",
    [
        ('{"identifier": "dev-1-0-0", }', ["not JSON"]),
        ("[1]", ["expected a JSON object", "[1]"]),
        (json.dumps({"sentence": "s"}), ["'identifier'", "a string", "without it", "sentence"]),
        (json.dumps(nlvr2_entry("dev-850-0-0", sentence=3)), ["'sentence'", "expected a string", "got 3"]),
        (json.dumps(nlvr2_entry("dev-850-0-0", "maybe")), ["unknown label 'maybe'", "False or True"]),
        (json.dumps(nlvr2_entry("dev-850-0-0", label=True)), ["'label'", "expected a string", "got True"]),
        (json.dumps(nlvr2_entry("test1-0-3-1")), ["'test1-0-3-1'", "dev-<set>-<pair>-<sentence>", "the file's split"]),
        (json.dumps(nlvr2_entry("../../dev-850-0-0")), ["dev-<set>-<pair>-<sentence>"]),
        (json.dumps(nlvr2_entry("train-7-0-0")), ["'directory'", "a whole number or a string"]),
    ],
)
def test_nlvr2_malformed_lines(nlvr2, line, pieces):
    file = nlvr2 / "dev.json"
    write(file, f"{file.read_text()}\n{line}\n")  # the blank line counts
    with refused(ValueError, f"{file}, line 3", *pieces):
        load_nlvr2(nlvr2, "dev")


@pytest.mark.parametrize(
    "images, pieces",
    [
        (["dev/dev-850-0-img0.png"], ["two images", "got 1"]),
        ([1, 2], ["'images'", "only strings", "got 1"]),
        (["dev/a.png", "dev/b.png"], ["'a-0'", "dev-<set>-<pair>-<sentence>"]),
        (["dev/dev-850-0-img0.png", "../dev-850-0-img1.png"], ["'../dev-850-0-img1.png'", "leads out"]),
    ],
)
def test_nlvr2_malformed_entries(nlvr2, images, pieces):
    right = {"sentence": "s", "label": "True", "images": [f"dev/dev-850-0-img{side}.png" for side in (0, 1)]}
    file = write(nlvr2 / "nlvr_dev.json", [right, {"sentence": "s", "label": "True", "images": images}])
    with refused(ValueError, f"{file}, entry 2", *pieces):
        load_nlvr2(file, "dev")


# VQAv2


def coco_image(root, folder, number, color=0):
    path = root / folder / f"COCO_{folder}_{number:012d}.jpg"
    draw(path, color)
    return path


@pytest.fixture
def vqav2(tmp_path):
    for subset, number in (("train2014", 9), ("val2014", 123456), ("test2015", 1), ("test-dev2015", 1)):
        questions = [
            {"question_id": number * 1000 + n, "image_id": number, "question": f"q{n} of {subset}?"} for n in (2, 0)
        ]
        document = {"data_subtype": subset, "task_type": "Open-Ended", "questions": questions}
        write(tmp_path / f"v2_OpenEnded_mscoco_{subset}_questions.json", document)
        if "test" not in subset:
            annotations = [
                {"question_id": question["question_id"], "answers": [{"answer": f"a{n}"} for n in range(9, -1, -1)]}
                for question in questions[::-1]
            ]
            write(tmp_path / f"v2_mscoco_{subset}_annotations.json", {"annotations": annotations})
        coco_image(tmp_path, subset.replace("-dev", ""), number)
    return tmp_path


@pytest.mark.parametrize("split, subset", [("train", "train2014"), ("validation", "val2014"), ("val", "val2014")])
def test_vqav2_official(vqav2, split, subset):
    dataset = load_vqav2(vqav2, split)
    number = 9 if split == "train" else 123456
    assert dataset.features == datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "question_id": datasets.Value("int64"),
            "answers": datasets.Sequence(datasets.Value("string")),
        }
    )
    assert dataset["question"][:] == [f"q2 of {subset}?", f"q0 of {subset}?"]
    assert dataset["question_id"][:] == [number * 1000 + 2, number * 1000]
    assert dataset["answers"][:] == [[f"a{n}" for n in range(9, -1, -1)]] * 2
    assert stored(dataset) == [vqav2 / subset / f"COCO_{subset}_{number:012d}.jpg"] * 2
    assert dataset[0]["image"].size == (4, 4)


@pytest.mark.parametrize("split, subset", [("test", "test2015"), ("test-dev", "test-dev2015")])
def test_vqav2_test_splits_have_no_answers(vqav2, split, subset):
    dataset = load_vqav2(vqav2, split)
    assert dataset["question"][0] == f"q2 of {subset}?"
    assert dataset["answers"][:] == [[], []]
    assert stored(dataset)[0].parent.name == "test2015"


def test_vqav2_files_elsewhere(vqav2):
    questions = (vqav2 / "v2_OpenEnded_mscoco_train2014_questions.json").rename(vqav2 / "mine.json")
    annotations = vqav2 / "v2_mscoco_train2014_annotations.json"
    with refused(FileNotFoundError, questions, "v2_mscoco_<subset>_annotations.json", "annotations"):
        load_vqav2(questions, "train")
    dataset = load_vqav2(questions, "train", image_dir=vqav2 / "train2014", annotations=str(annotations))
    assert len(dataset["answers"][0]) == 10
    annotations.unlink()
    with refused(FileNotFoundError, questions, annotations):
        load_vqav2(questions, "train", annotations=annotations)


def test_vqav2_blip(tmp_path):
    image = coco_image(tmp_path, "val2014", 5)
    entry = {"question_id": 5000, "question": "q?", "image": "val2014/" + image.name, "dataset": "vqa"}
    file = write(tmp_path / "vqa_val.json", [entry | {"answer": ["net", "a", "net"]}, entry | {"answer": "one"}])
    dataset = load_vqav2(tmp_path, "validation")
    assert dataset["answers"][:] == [["net", "a", "net"], ["one"]]
    assert dataset["question_id"][:] == [5000, 5000]
    assert stored(dataset) == [image, image]
    with refused(ValueError, file, "annotations"):
        load_vqav2(file, "val", annotations=file)

    write(tmp_path / "vqa_test.json", [entry])
    assert load_vqav2(tmp_path, "test")["answers"][:] == [[]]
    write(tmp_path / "vqa_train.json", [entry])
    with refused(ValueError, tmp_path / "vqa_train.json", "entry 1", "'answer'"):
        load_vqav2(tmp_path, "train")


@pytest.mark.parametrize(
    "fields, pieces",
    [
        ({"question_id": "5000"}, ["'question_id'", "a whole number", "got '5000'"]),
        ({"question_id": True}, ["'question_id'", "got True"]),
        ({"question_id": None}, ["'question_id'", "got None"]),
        ({"answer": ["a", 1]}, ["'answer'", "only strings", "got 1"]),
        ({"answer": {"a": 1}}, ["'answer'", "a list or a string"]),
        ({"image": ["a.jpg"]}, ["'image'", "a string"]),
    ],
)
def test_vqav2_malformed_entries(tmp_path, fields, pieces):
    draw(tmp_path / "a.jpg")
    right = {"question_id": 5000, "question": "q?", "image": "a.jpg", "answer": "yes"}
    file = write(tmp_path / "vqa_train.json", [right, right | fields])
    with refused(ValueError, f"{file}, entry 2", *pieces):
        load_vqav2(tmp_path, "train")


def test_vqav2_questions_and_annotations_must_match(vqav2):
    file = vqav2 / "v2_OpenEnded_mscoco_train2014_questions.json"
    with refused(ValueError, file, "'train2014'", "'val2014'", "the file's split"):
        load_vqav2(file, "validation")
    with refused(ValueError, f"{file}, questions, entry 1", "9002", "no annotation"):
        load_vqav2(file, "train", annotations=vqav2 / "v2_mscoco_val2014_annotations.json")
    annotations = vqav2 / "v2_mscoco_train2014_annotations.json"
    write(annotations, {"annotations": [{"question_id": 9002, "answers": [{"answer": "a"}, {}]}]})
    with refused(ValueError, f"{annotations}, annotations, entry 1, answers, entry 2", "'answer'"):
        load_vqav2(file, "train")
    write(annotations, {})
    with refused(ValueError, annotations, "'annotations'", "fields: none"):
        load_vqav2(file, "train")


# COCO


def karpathy_entry(filename, split, *captions, **fields):
    return {"filename": filename, "split": split, "sentences": [{"raw": caption} for caption in captions]} | fields


@pytest.fixture
def karpathy_coco(tmp_path):
    rows = [("restval", "val2014", 42), ("train", "train2014", 9), ("val", "val2014", 7), ("test", "val2014", 391895)]
    entries = []
    for split, folder, number in rows:
        image = coco_image(tmp_path, folder, number, number % 200)
        captions = [f"{split} b", f"{split} a"]
        entries.append(karpathy_entry(image.name, split, *captions, filepath=folder, cocoid=number))
    write(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    return tmp_path


def test_coco_karpathy(karpathy_coco):
    dataset = load_coco_captions(karpathy_coco, "train")
    assert dataset.features == datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.Sequence(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    assert dataset["captions"][:] == [["restval b", "restval a"], ["train b", "train a"]]
    assert dataset["image_id"][:] == ["42", "9"]
    assert abs(red(dataset[0]["image"]) - 42) < 5
    assert load_coco_captions(karpathy_coco, "train", include_restval=False)["image_id"][:] == ["9"]
    assert load_coco_captions(karpathy_coco, "validation")["image_id"][:] == ["7"]
    test = load_coco_captions(karpathy_coco / "dataset_coco.json", "test")
    assert stored(test) == [karpathy_coco / "val2014" / "COCO_val2014_000000391895.jpg"]


def test_coco_blip(tmp_path):
    a, b = (coco_image(tmp_path, "train2014", number) for number in (391895, 57870))
    entries = [
        {"caption": caption, "image": f"train2014/{image.name}", "image_id": "coco_0"}
        for caption, image in (("a2", a), ("b1", b), ("a1", a), ("a1", a))
    ]
    file = write(tmp_path / "coco_karpathy_train.json", entries)
    dataset = load_coco_captions(tmp_path, "train")
    assert dataset["captions"][:] == [["a2", "a1", "a1"], ["b1"]]
    assert dataset["image_id"][:] == ["391895", "57870"]
    assert stored(dataset) == [a, b]
    with refused(ValueError, file, "restval", "dataset_coco.json"):
        load_coco_captions(tmp_path, "train", include_restval=False)

    write(tmp_path / "coco_karpathy_val.json", [{"image": f"train2014/{b.name}", "caption": ["x", "y"]}])
    dataset = load_coco_captions(tmp_path, "validation", include_restval=False)
    assert dataset["captions"][:] == [["x", "y"]]
    assert dataset["image_id"][:] == ["57870"]


@pytest.mark.parametrize(
    "fields, pieces",
    [
        ({"split": "dev"}, ["entry 2", "unknown split 'dev'", "restval"]),
        ({"sentences": [{"raw": "a"}, {"tokens": []}]}, ["entry 2, sentences, entry 2", "'raw'", "tokens"]),
        ({"sentences": []}, ["entry 2, sentences", "an empty one"]),
        ({"sentences": "a"}, ["entry 2", "'sentences'", "a list"]),
        ({"cocoid": "9"}, ["entry 2", "'cocoid'", "a whole number"]),
        ({"filename": None}, ["entry 2", "'filename'", "a string"]),
        ({"filepath": "../x"}, ["entry 2", "leads out"]),
        ({"filepath": "", "filename": "x.jpg"}, ["entry 2", "'/x.jpg' leads out"]),
    ],
)
def test_coco_malformed_entries(karpathy_coco, fields, pieces):
    file = karpathy_coco / "dataset_coco.json"
    document = json.loads(file.read_text())
    document["images"][1].update(fields)
    write(file, document)
    with refused(ValueError, f"{file}, images", *pieces):
        load_coco_captions(karpathy_coco, "train")


# Flickr30k


@pytest.mark.parametrize("folder", ["", "flickr30k-images"])
def test_flickr30k_karpathy(tmp_path, folder):
    entries = [karpathy_entry(f"{n}.jpg", split, f"{n}a", f"{n}b") for n, split in ((7, "test"), (3, "train"))]
    write(tmp_path / "dataset_flickr30k.json", {"images": entries})
    for n in (3, 7):
        draw(tmp_path / folder / f"{n}.jpg")
    dataset = load_flickr30k(tmp_path, "test")
    assert dataset[:]["captions"] == [["7a", "7b"]]
    assert dataset["image_id"][:] == ["7"]
    assert stored(dataset) == [tmp_path / folder / "7.jpg"]
    assert load_flickr30k(tmp_path, "all")["image_id"][:] == ["7", "3"]
    with refused(ValueError, "dataset_flickr30k.json", "nothing of the split"):
        load_flickr30k(tmp_path, "validation")


def test_flickr30k_authors(tmp_path):
    lines = ["1000092795.jpg#0\tTwo young guys .", "10002456.jpg#0\tMen .\u2028", "1000092795.jpg#1\tTwo\tmen .\r", ""]
    file = write(tmp_path / "results_20130124.token", "\n".join(lines))
    for name in ("1000092795", "10002456"):
        draw(tmp_path / "flickr30k-images" / f"{name}.jpg")
    dataset = load_flickr30k(tmp_path, "all")
    assert dataset["image_id"][:] == ["1000092795", "10002456"]
    assert dataset["captions"][:] == [["Two young guys .", "Two\tmen ."], ["Men .\u2028"]]
    with refused(ValueError, file, "no splits", "split='all'", "'train'", "dataset_flickr30k.json"):
        load_flickr30k(tmp_path, "train")
    write(file, "\n".join([*lines[:2], "10002456.jpg Men ."]))
    with refused(ValueError, f"{file}, line 3", "<image>#<number><tab><caption>", "10002456.jpg Men"):
        load_flickr30k(file, "all")


def test_flickr30k_blip(tmp_path):
    for name in "ab":
        draw(tmp_path / "flickr30k-images" / f"{name}.jpg")
    path = "flickr30k-images/{}.jpg".format
    entries = [{"image": path(name), "caption": caption} for name, caption in ("b2", "a1", "b1")]
    file = write(tmp_path / "flickr30k_train.json", entries)
    write(tmp_path / "flickr30k_val.json", [{"image": path("a"), "caption": ["x", "y"]}])
    train = load_flickr30k(tmp_path, "train")
    assert train["image_id"][:] == ["b", "a"]
    assert train["captions"][:] == [["2", "1"], ["1"]]
    # image_dir may be the images' own folder too
    validation = load_flickr30k(tmp_path, "validation", image_dir=tmp_path / "flickr30k-images")
    assert validation["captions"][:] == [["x", "y"]]
    with refused(ValueError, file, "one split"):
        load_flickr30k(file, "all")
    write(file, [*entries, {"image": path("a"), "caption": []}])
    with refused(ValueError, f"{file}, entry 4", "at least one caption"):
        load_flickr30k(file, "train")


# What all of them share


FILES = {"nlvr2": "nlvr_train", "vqav2": "vqa_train", "coco": "coco_karpathy_train", "flickr30k": "flickr30k_train"}


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    """(reader, a file of BLIP's for its train split, the file's one image)."""
    image = tmp_path / "train-1-0-img0.png"
    draw(image)
    entry = {"question": "q", "question_id": 1, "answer": "a", "image": image.name, "caption": "c"}
    if request.param == "nlvr2":
        entry = {"sentence": "s", "label": "True", "images": [image.name] * 2}
    return READERS[request.param], write(tmp_path / f"{FILES[request.param]}.json", [entry]), image


def test_images_are_opened_when_their_row_is_read(reader):
    read, file, image = reader
    image.write_bytes(b"no image")
    dataset = read(file, "train")
    assert len(dataset) == 1
    with pytest.raises(UnidentifiedImageError):
        dataset[0]


def test_paths_do_not_hang_on_the_working_directory(reader, tmp_path, monkeypatch):
    read, file, image = reader
    monkeypatch.chdir(tmp_path)
    dataset = read(file.name, "train", image_dir=".")
    monkeypatch.chdir("/")
    column = "left_image" if read is load_nlvr2 else "image"
    assert stored(dataset, column) == [image]
    assert dataset[0][column].size == (4, 4)


def test_missing_images(reader):
    read, file, image = reader
    image.unlink()
    with refused(FileNotFoundError, f"{file}, entry 1", file.parent, f"no image {image.name}", "image_dir"):
        read(file, "train")
    with refused(FileNotFoundError, "image_dir=/nowhere"):
        read(file, "train", image_dir="/nowhere")


@pytest.mark.parametrize(
    "path",
    ["{image}", "../{folder}/{image.name}", "..", "a/../{image.name}", "..\\x.png", "C:\\x.png", "\\\\host\\x.png"],
)
def test_images_stay_in_their_folder(reader, path):
    read, file, image = reader
    path = path.format(image=image, folder=image.parent.name)
    write(file, file.read_text().replace(json.dumps(image.name), json.dumps(path)))
    if read is load_nlvr2:  # the left image's name has to give an identifier first
        entries = json.loads(file.read_text())
        entries[0]["images"][0] = image.name
        write(file, entries)
    with refused(ValueError, f"{file}, entry 1", repr(path), "leads out"):
        read(file, "train")


def test_names_with_dots_are_no_way_out(tmp_path):
    draw(tmp_path / "a..b" / "..c.jpg")
    file = write(tmp_path / "flickr30k_train.json", [{"image": "a..b/..c.jpg", "caption": "c"}])
    assert load_flickr30k(file, "train")["image_id"][:] == ["..c"]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("", ["line 1", "empty"]),
        (" \n\n", ["line 1", "empty"]),
        ("[]", ["an empty one"]),
        ("[\n{},\n{'a': 1}\n]", ["line 3, column 2", "not JSON", "Download"]),
        ('[{"image": "a', ["line 1", "not JSON"]),
        ("[\n3\n]", ["entry 1", "expected a JSON object", "got 3"]),
        ("3", ["expected a JSON"]),
        ("{}", ["line 1", "'identifier'"]),
        (b"[\n\n\xff]", ["line 3", "not UTF-8"]),
    ],
)
def test_broken_files(reader, text, pieces):
    read, file, _ = reader
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if text == "{}" and read is not load_nlvr2:  # there an object is a line
        pieces = ["'questions'" if read is load_vqav2 else "'images'", "fields: none"]
    with refused(ValueError, file, *pieces):
        read(file, "train")


def test_byte_order_mark(reader):
    read, file, _ = reader
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read(file, "train")) == 1


def test_unknown_splits(reader):
    read, file, _ = reader
    with refused(ValueError, "split='trian'", "train, validation"):
        read(file, "trian")


def test_folder_without_the_file(reader, tmp_path):
    read, file, _ = reader
    folder = tmp_path / "empty"
    folder.mkdir()
    with refused(FileNotFoundError, folder, file.name):
        read(folder, "train")


@pytest.mark.parametrize(
    "path", ["./data", "/data/x", "data/x.json", "a/b/c", "x.token", "~/nowhere", Path("org/set")]
)
def test_what_looks_like_a_path_is_not_sought_on_the_hub(reader, path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("sought on the Hub"))
    with refused(FileNotFoundError, path, "expected a split's file"):
        reader[0](path, "train")


def test_options_for_the_hub_and_for_files_do_not_mix(reader, tmp_path):
    read, file, _ = reader
    with refused(ValueError, "columns", file):
        read(file, "train", columns={})
    with refused(ValueError, "image_dir", "org/set"):
        read("org/set", "train", image_dir=tmp_path)


# The Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`hub(columns, **features)` publishes columns as org/set, and gives the calls of `load_dataset`; "a.png" is an
    image."""
    draw(tmp_path / "a.png", 77)

    def publish(columns, **features):
        images = {name: datasets.Image() for name, values in columns.items() if values == ["a.png"]}
        columns |= {name: [str(tmp_path / "a.png")] for name in images}
        inferred = datasets.Dataset.from_dict(columns).features
        dataset = datasets.Dataset.from_dict(columns, datasets.Features({**inferred, **images, **features}))
        calls = []

        def load_dataset(name, split):
            calls.append((name, split))
            return dataset

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return calls

    return publish


def test_hub_columns(hub):
    # swapped names, an extra column, a number of another width, an image with a mode of its own
    calls = hub(
        {"question": [["yes"]], "answers": ["is it?"], "id": [3], "img": ["a.png"], "extra": [1]},
        id=datasets.Value("int32"),
        img=datasets.Image(mode="RGB"),
    )
    columns = {"image": "img", "question": "answers", "answers": "question", "question_id": "id"}
    dataset = load_vqav2("org/set", "validation", columns=columns)
    assert calls == [("org/set", "validation")]
    assert dataset.column_names == ["image", "question", "question_id", "answers"]
    assert dataset.features["question_id"] == datasets.Value("int64")
    row = dataset[0]
    assert (red(row.pop("image")), row) == (77, {"question": "is it?", "question_id": 3, "answers": ["yes"]})


@pytest.mark.parametrize("labels", [["True"], [1], [True]])
def test_hub_labels(hub, labels):
    hub({"left_image": ["a.png"], "right_image": ["a.png"], "sentence": ["s"], "label": labels, "identifier": ["i"]})
    dataset = load_nlvr2("org/set", "test")
    assert dataset.features["label"].names == ["False", "True"]
    assert dataset["label"][:] == [1]


@pytest.mark.parametrize(
    "labels, feature, pieces",
    [
        ([0], datasets.ClassLabel(names=["True", "False"]), ["its classes are ['True', 'False']"]),
        (["yes"], datasets.Value("string"), ["Value('string')"]),
        ([2], datasets.Value("int64"), ["Value('int64')", "labels are [2]"]),
        ([-1], datasets.ClassLabel(names=["False", "True"]), ["labels are [-1]"]),
        ([["True"]], datasets.Sequence(datasets.Value("string")), ["List"]),
    ],
)
def test_hub_other_labels(hub, labels, feature, pieces):
    rows = {
        "left_image": ["a.png"],
        "right_image": ["a.png"],
        "sentence": ["s"],
        "answer": labels,
        "identifier": ["i"],
    }
    hub(rows, answer=feature)
    with refused(ValueError, "org/set", "'answer'", *pieces):
        load_nlvr2("org/set", "test", columns={"label": "answer"})


def test_hub_errors(hub, monkeypatch):
    hub({"img": ["a.png"], "captions": [[{"raw": "a"}]], "image_id": ["1"]})
    with refused(ValueError, "org/set", "no column image:", "img, captions, image_id", "columns"):
        load_flickr30k("org/set", "test")
    with refused(ValueError, "no column picture:"):
        load_coco_captions("org/set", "test", columns={"image": "picture"})
    with refused(ValueError, "'picture'", "image, captions, image_id"):
        load_coco_captions("org/set", "test", columns={"picture": "img"})
    with refused(ValueError, "'img'", "a column of its own"):
        load_coco_captions("org/set", "test", columns={"image": "img", "image_id": "img"})
    with refused(ValueError, "column 'captions' is", "expected List(Value('string'))", "convert"):
        load_coco_captions("org/set", "test", columns={"image": "img"})

    def load_dataset(name, split):
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with refused(FileNotFoundError, "org/set", "not a local file or folder", "no such data set"):
        load_coco_captions("org/set", "test")


def test_hub_data_set_as_datasets_reads_it(tmp_path, monkeypatch):
    """A real repository of image files and metadata, in the place of one on the Hub."""
    draw(tmp_path / "repository" / "test" / "a.png", 5)
    write_lines(
        tmp_path / "repository" / "test" / "metadata.jsonl", [{"file_name": "a.png", "texts": ["x"], "id": "1"}]
    )
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, split: load_dataset(str(tmp_path / "repository"), split=split)
    )
    dataset = load_coco_captions("org/set", "test", columns={"captions": "texts", "image_id": "id"})
    row = dataset[0]
    assert (red(row["image"]), row["captions"], row["image_id"]) == (5, ["x"], "1")
