"""Rows from every kind of source: what is read, what is refused, and that nothing is lost silently."""

import io
import json
import os
import re
import tarfile
import warnings
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from madtp_hf.data import load_rows, load_table, open_rows
from madtp_hf.data.image_files import path_inside
from madtp_hf.modeling.images import UnreadableImage, read_image
from madtp_hf.tasks import TASKS


VQA = TASKS["vqa"]
NAMES = ["0.png", "1.png", "more/2.png"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(NAMES):
        Image.new("RGB", (6, 6), (index * 20, 0, 0)).save(folder / name)
    return folder


def all_rows(source, **options):
    rows = open_rows(source, **options)
    return list(rows.rows(0, len(rows)))


def write_table(kind: str, folder: Path, images: list[str], questions: list[str], name="table") -> Path:
    path = folder / f"{name}.{kind}"
    entries = [{"image": image, "question": question} for image, question in zip(images, questions)]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)
    elif kind == "txt":
        path.write_text("".join(f"{image}\t{question}\n" for image, question in zip(images, questions)))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    elif kind == "json":
        path.write_text(json.dumps(entries))
    else:
        comma = "\t" if kind == "tsv" else ","
        path.write_text("".join(f"{a}{comma}{b}\n" for a, b in [("image", "question"), *zip(images, questions)]))
    return path


KINDS = ("txt", "csv", "tsv", "jsonl", "json", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_all_tables_give_the_same_rows_on_every_road(kind, folder):
    table = write_table(kind, folder, NAMES, ["a ?", "b ?", "c ?"])
    rows = all_rows(table)
    assert [(row.index, row.key, row.error) for row in rows] == [(i, name, None) for i, name in enumerate(NAMES)]
    assert [row.values["image"] for row in rows] == [str(folder / name) for name in NAMES]
    assert [row.values["question"] for row in rows] == ["a ?", "b ?", "c ?"]
    loaded = load_rows(VQA, table)
    assert [(row["image"], row["question"]) for row in loaded] == [
        (row.values["image"], row.values["question"]) for row in rows
    ]
    assert load_table(table, "vqa")["question"][:] == ["a ?", "b ?", "c ?"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "path", ["../secret.png", "more/../../secret.png", "/etc/hostname", "..\\secret.png", "C:\\x.png"]
)
def test_a_path_that_leads_out_is_refused_on_every_road_with_its_row(kind, path, folder, tmp_path):
    Image.new("RGB", (6, 6)).save(tmp_path / "secret.png")
    table = write_table(kind, folder, ["0.png", path], ["a ?", "b ?"])
    good, bad = all_rows(table)
    assert good.error is None and "leads out of the image folder" in bad.error and bad.values["image"] is None
    for load in (
        lambda **options: load_rows(VQA, table, **options),
        lambda **options: load_table(table, "vqa", **options),
    ):
        with pytest.raises(ValueError, match=r"table\.\w+, row 2: image path .* leads out of the image folder"):
            load()
        with pytest.warns(UserWarning, match=r"Left out 1 of the rows of .*table\.\w+ \(row 2: image path"):
            assert len(load(on_error="skip")) == 1


def test_paths_inside_the_image_folder(folder, tmp_path):
    absolute = str(folder / "0.png")
    table = write_table("jsonl", tmp_path, [absolute, "more/2.png"], ["a ?", "b ?"])
    assert [row.error for row in all_rows(table, image_dir=folder)] == [None, None]
    assert "leads out" in all_rows(table, image_dir=folder / "more")[0].error
    assert path_inside("a..b/..c.png", "/x") == "/x/a..b/..c.png"
    with pytest.raises(ValueError, match="leads out"):
        path_inside("/xy/a.png", "/x")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")  # the folder's owner made it
    Image.new("RGB", (3, 3)).save(tmp_path / "elsewhere.png")
    table = write_table("csv", folder, ["link.png"], ["a ?"])
    assert len(load_rows(VQA, table, on_error="skip")) == 1


def test_tables_in_several_folders_need_an_image_folder(folder, tmp_path):
    tables = [write_table("csv", one, ["2.png"], ["a ?"]) for one in (folder, folder / "more")]
    assert all("in tables of several folders" in row.error for row in all_rows(tables))
    assert [row.error for row in all_rows(tables, image_dir=folder / "more")] == [None, None]


def test_paths_in_structs_of_parquet_stay_inside_too(folder):
    images = [{"bytes": None, "path": "0.png"}, {"bytes": None, "path": "../x.png"}, {"bytes": b"x", "path": "/y"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "question": ["?"] * 3}), folder / "t.parquet")
    first, second, third = all_rows(folder / "t.parquet")
    assert first.values["image"] == str(folder / "0.png") and third.values["image"] == b"x"
    assert "leads out" in second.error


def test_one_walk_of_folders(folder, monkeypatch):
    (folder / ".hidden").mkdir()
    for name in (".hidden/a.png", ".b.png", "._0.png", "more/._2.png", "notes.md"):
        (folder / name).write_bytes(b"no")
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "linked.png").symlink_to("0.png")
    (folder / "locked").mkdir()
    scandir = os.scandir

    def refuses(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    rows = all_rows(folder, wanted=("image",))
    assert [row.key for row in rows] == ["0.png", "1.png", "broken.png", "linked.png", "more/2.png", "locked"]
    assert [row.error for row in rows] == [None] * 5 + ["the folder can't be read: permission denied"]
    with pytest.warns(UserWarning, match="Left out 2 of the rows") as caught:
        assert len(load_rows(VQA, folder, ["what ?"], on_error="skip")) == 4
    message = str(caught[0].message)
    assert len(caught) == 1 and "row 3: image: no file" in message and "row 6: the folder can't be read" in message


def test_one_broken_image_stops_nothing_if_rows_may_be_skipped(folder):
    (folder / "1.png").write_text("404 Not Found")
    assert len(load_rows(VQA, folder, ["what ?"])) == 3
    with pytest.warns(UserWarning, match=r"Left out 1 of the rows of .*photos \(row 2: not an image"):
        rows = load_rows(VQA, folder, ["what ?"], on_error="skip")
    assert [Path(row["image"]).name for row in rows] == ["0.png", "2.png"]
    for index in (3, 4, 5):
        Image.new("RGB", (6, 6)).save(folder / f"{index}.png")
    with pytest.warns(UserWarning, match="row 1: not an image"):
        pairs = load_rows(TASKS["nlvr2"], folder, ["one"], on_error="skip")
    # The images of a pair go together, and no other pair shifts.
    assert [(Path(row["left_image"]).name, Path(row["right_image"]).name) for row in pairs] == [
        ("3.png", "4.png"),
        ("5.png", "2.png"),
    ]


def test_the_same_bad_row_has_the_same_number_everywhere(folder):
    table = folder / "t.csv"
    table.write_text('image,question\n0.png,a ?\n\n1.png,"b ?\nin two lines"\n0.png,c ?,d\nmore/2.png,e ?\n')
    bad = all_rows(table)[2]
    assert bad.index == 2 and bad.error.startswith("t.csv, line 6: 3 cells, expected 2")
    for load in (lambda: load_rows(VQA, table), lambda: load_table(table, "vqa")):
        with pytest.raises(ValueError, match=r"t.csv, row 3: t.csv, line 6: 3 cells"):
            load()
    (folder / "t.jsonl").write_text(
        '{"image": "0.png", "question": "a"}\n{"image": \n[1]\n{"image": 7, "question": "a"}\n'
    )
    errors = [row.error for row in all_rows(folder / "t.jsonl")]
    assert errors[0] is None and "line 2: not JSON" in errors[1] and "line 3: expected a JSON object" in errors[2]
    assert errors[3] == "image: expected a path or the bytes of an image, got 7"


def test_a_text_that_is_nowhere_is_known_before_anything_is_read(folder, monkeypatch):
    with pytest.raises(ValueError, match="photos has no question: question answering reads a text with each image"):
        load_rows(VQA, folder)
    for kind in ("csv", "jsonl", "parquet"):
        table = write_table(kind, folder, NAMES, ["a"] * 3)
        assert "question" in open_rows(table).columns
        with pytest.raises(ValueError, match="no column image_url: it has image, question; pass columns="):
            open_rows(table, columns={"image": "image_url"})
    assert "question" not in open_rows(folder).columns
    (folder / "list.txt").write_text("0.png\n")
    assert "question" not in open_rows(folder / "list.txt").columns


def test_usual_names_of_columns_and_metadata_of_a_folder(folder):
    (folder / "metadata.csv").write_text('file_name,text\n0.png,a seven\n0.png,"[""two"", ""three""]"\n')
    assert [row.key for row in all_rows(folder, wanted=("image", "key"))] == NAMES  # no text is wanted
    (row,) = load_rows(TASKS["captioning"], folder)
    assert row["captions"] == ["a seven", "two", "three"] and row["image_id"] == str(folder / "0.png")
    questions = load_rows(VQA, folder, where={"file_name": "0.png"})
    assert [row["question"] for row in questions] == ["a seven", '["two", "three"]']


def test_half_of_a_surrogate_pair_is_replaced(folder):
    table = folder / "t.jsonl"
    table.write_text('{"image": "0.png", "id": "a\\ud800b", "question": "what\\udfff ?"}\n')
    rows = open_rows(table)
    (row,) = rows.rows(0, 1)
    assert (row.key, row.values["question"]) == ("a\ufffdb", "what\ufffd ?")
    assert rows.identities().tolist() == open_rows(table).identities().tolist()
    table.write_text('{"image": "\\ud800.png"}\n')
    (row,) = all_rows(table)
    assert row.key == "\ufffd.png"
    with pytest.raises(UnreadableImage, match="no such file"):
        read_image(row.values["image"])
    (folder / os.fsdecode(b"\xff.png")).write_bytes((folder / "0.png").read_bytes())
    assert len(open_rows(folder).identities()) == len(NAMES) + 1
    assert load_rows(VQA, folder, ["what ?"], on_error="skip")


def write_tar(path: Path, folder: Path, texts=False) -> Path:
    with tarfile.open(path, "w") as tar:
        for index, name in enumerate(NAMES):
            tar.add(folder / name, f"{index:03}.png")
            if texts:
                content = json.dumps({"question": f"is it {index} ?", "label": 1}).encode()
                member = tarfile.TarInfo(f"{index:03}.json")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_tars_are_read_in_place_with_their_texts(folder, tmp_path):
    rows = load_rows(VQA, write_tar(tmp_path / "a.tar", folder, texts=True))
    assert [row["question"] for row in rows] == ["is it 0 ?", "is it 1 ?", "is it 2 ?"]
    assert rows[1]["image"] == (folder / "1.png").read_bytes()
    assert [row.key for row in all_rows(tmp_path / "*.tar")] == open_rows(tmp_path / "a.tar").keys()
    with pytest.raises(ValueError, match=r"a\.tar is not a table: read it with load_rows"):
        load_table(tmp_path / "a.tar", "vqa")
    assert "question" not in open_rows(write_tar(tmp_path / "b.tar", folder)).columns


@pytest.mark.parametrize("damage", ["checksum", "in a header", "before a header", "no end", "in an image", "joined"])
def test_a_damaged_tar_loses_nothing_silently(damage, folder, tmp_path):
    """The second of three samples is damaged; the samples before, and the other tar's, are read."""
    whole = write_tar(tmp_path / "a-0.tar", folder).read_bytes()
    write_tar(tmp_path / "a-1.tar", folder)
    with tarfile.open(tmp_path / "a-0.tar") as tar:
        second = tar.getmembers()[1].offset
        end = tar.getmembers()[2].offset_data + 512
    content = {
        "checksum": whole[: second + 150] + b"77" + whole[second + 152 :],
        "in a header": whole[: second + 100],
        "before a header": whole[:second],
        "no end": whole[:end],
        "in an image": whole[: second + 520],
        "joined": whole + whole,
    }[damage]
    (tmp_path / "a-0.tar").write_bytes(content)
    rows = all_rows(tmp_path / "a-{0..1}.tar")
    good = [row.key for row in rows if row.error is None]
    (bad,) = [row for row in rows if row.error is not None]
    kept = 3 if damage in ("no end", "joined") else 1
    assert good[-3:] == ["000", "001", "002"] and good[: len(good) - 3] == ["000", "001", "002"][: len(good) - 3]
    assert len(good) - 3 == kept and bad.key == "a-0.tar" and bad.index == kept
    assert re.search(r"a-0.tar can't be read to its end .*expected a whole, uncompressed tar", bad.error)
    with pytest.warns(UserWarning, match=f"row {kept + 1}: .*a-0.tar can't be read"):
        assert len(load_rows(VQA, tmp_path / "a-*.tar", ["what ?"], on_error="skip")) == kept + 3
    (tmp_path / "no.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ValueError, match=r"no.tar can't be read to its end"):
        open_rows(tmp_path / "no.tar")


def test_identities_notice_size_and_time(folder, tmp_path):
    def touch(path, seconds=1):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))

    def identities(source):
        return open_rows(source).identities().tolist()

    pyarrow.parquet.write_table(pyarrow.table({"image": [b"0", b"1"]}), tmp_path / "t.parquet")
    saved = datasets.Dataset.from_dict({"image": [str(folder / "0.png")]})
    saved.save_to_disk(tmp_path / "saved")
    table = write_table("csv", folder, NAMES, ["a"] * 3)
    sources = {
        folder: folder / "0.png",
        table: folder / "1.png",
        tmp_path / "t.parquet": tmp_path / "t.parquet",
        write_tar(tmp_path / "a.tar", folder): tmp_path / "a.tar",
        tmp_path / "saved": next((tmp_path / "saved").glob("*.arrow")),
    }
    for source, file in sources.items():
        before = identities(source)
        assert identities(source) == before
        touch(file)
        after = identities(source)
        assert after != before
        if source == folder:
            (folder / "0.png").rename(folder / "00.png")
            assert identities(source) != after
            (folder / "00.png").rename(folder / "0.png")
        if source in (folder, table):  # the rows of other images are as they were
            assert sum(one != other for one, other in zip(before, after)) == 1
    before = identities(table)
    write_table("csv", folder, NAMES, ["a", "a", "b"])
    assert [one == other for one, other in zip(identities(table), before)] == [True, True, False]


def test_samples_are_drawn_and_only_they_are_read(folder, tmp_path):
    contents = [(folder / name).read_bytes() for name in NAMES] * 4
    table = pyarrow.table({"image": contents, "question": [f"{index} ?" for index in range(12)]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=5)
    rows = load_rows(VQA, tmp_path / "t.parquet", samples=4, seed=1)
    assert len(rows) == 4 and rows == load_rows(VQA, tmp_path / "t.parquet", samples=4, seed=1)
    assert all(row["image"] == contents[int(row["question"][:-2])] for row in rows)
    assert [row["image_id"] for row in rows] == [str(int(row["question"][:-2]) + 1) for row in rows]
    opened = open_rows(tmp_path / "t.parquet")
    for start, stop in ((4, 7), (7, 12), (0, 2), (1, 12), (11, 12), (3, 3)):
        assert [row.index for row in opened.rows(start, stop)] == list(range(start, stop))
    first, second = opened.rows(0, 6), opened.rows(6, 9)
    assert [next(first).index, next(second).index, next(first).index, next(second).index] == [0, 6, 1, 7]


def test_sources_that_will_not_do(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "latin.csv").write_bytes("image,question\na.png,où ?\n".encode("latin-1"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 broken PAR1")
    (tmp_path / "twice.csv").write_text("image,image\na,b\n")
    (tmp_path / "header.csv").write_text("image,question\n")
    for source, error, message in (
        (tmp_path / "nowhere", FileNotFoundError, "There is no .*nowhere: expected a folder of images"),
        (tmp_path / "none.csv", FileNotFoundError, "There is no file .*none.csv"),
        (tmp_path / "x-*.tar", FileNotFoundError, r"There is no file .*x-\*.tar"),
        (tmp_path / "empty", ValueError, "empty holds no image"),
        (tmp_path / "a.xlsx", ValueError, "unsupported table format .xlsx"),
        ([tmp_path / "latin.csv", tmp_path / "broken.parquet"], ValueError, "unsupported table format .csv, .parquet"),
        (tmp_path / "latin.csv", ValueError, "latin.csv is not UTF-8 text"),
        (tmp_path / "broken.parquet", ValueError, "broken.parquet can't be read as Parquet"),
        (tmp_path / "twice.csv", ValueError, "line 1: expected names of columns, each once"),
        (tmp_path / "header.csv", ValueError, "no row that can be used"),
        ([], ValueError, "The list holds no image"),
    ):
        with pytest.raises(error, match=message) as caught:
            open_rows(source)
        assert "\n" not in str(caught.value) and "--" not in str(caught.value)


def test_data_sets_of_datasets(folder, tmp_path):
    images = [{"bytes": (folder / name).read_bytes(), "path": None} for name in NAMES]
    features = datasets.Features({"photo": datasets.Image(), "question": datasets.Value("string")})
    one = datasets.Dataset.from_dict({"photo": images, "question": ["a", "b", "c"]}, features=features)
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(tmp_path / "saved")
    assert [row.values["question"] for row in all_rows(tmp_path / "saved", split="test")] == ["c"]
    with pytest.raises(ValueError, match="has the splits train, test: choose one of them"):
        open_rows(tmp_path / "saved")
    rows = load_rows(VQA, tmp_path / "saved", split="train")
    assert [row["image"] for row in rows] == [image["bytes"] for image in images]
    one.save_to_disk(tmp_path / "single")
    table = load_table(tmp_path / "single", "vqa", columns={"image": "photo"})
    assert [row["image"].getpixel((0, 0))[0] for row in table] == [0, 20, 40]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_rows(VQA, tmp_path / "single", on_error="skip", split=None)
