"""Image search: embeddings, an index on disk and queries of it, from Python and from the command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("faiss", reason="image search needs the extra `search`")
pytest.importorskip("pyarrow", reason="image search needs the extra `search`")
pytest.importorskip("typer", reason="the command needs the extra `cli`")
pytest.importorskip("sklearn", reason="digit scenes need the extra `digits`")
from transformers.utils.logging import warning_once
from typer.testing import CliRunner

from madtp_hf.checkpoints.load import load
from madtp_hf.data.digit_scenes import describe_from_all_sides, draw_scenes
from madtp_hf.jobs import ImageEmbedder
from madtp_hf.modeling.images import read_image
from madtp_hf.search import encode_images, encode_texts, index_images, load_index, search
from madtp_hf_cli import app

from .conftest import make_task_model
from .helpers.clip import make_clip_model, make_clip_processor


MODEL = Path(__file__).parents[1] / "examples" / "blip-retrieval-digits"
NUMBER = 24


@pytest.fixture(scope="module")
def blip():
    """The shipped retrieval model and its processor."""
    loaded = load(MODEL, device="cpu")
    return loaded.model, loaded.processor


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(NUMBER, "test", np.random.default_rng(0))


@pytest.fixture
def photos(tmp_path, scenes):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index, image in enumerate(scenes.images):
        Image.fromarray(image).save(folder / ("more" if index % 2 else "") / f"{index:02}.png")
    (folder / "notes.txt").write_text("no image, and not taken for one")
    return folder


@pytest.fixture
def index(blip, photos, tmp_path):
    return index_images(*blip, photos, tmp_path / "index")


def name_of(hit):
    return Path(hit["path"]).stem


def caption(scenes, index):
    return describe_from_all_sides(scenes, index)[0]


# Embeddings


def test_images_are_embedded_whatever_they_come_as(blip, photos):
    path = photos / "00.png"
    of_paths = encode_images(*blip, [path, str(photos / "02.png")], batch_size=1)
    assert of_paths.shape == (2, 64) and of_paths.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(of_paths, axis=1), 1, atol=1e-5)
    for source in (Image.open(path), path.read_bytes()):
        np.testing.assert_allclose(encode_images(*blip, [source])[0], of_paths[0], atol=1e-5)
    np.testing.assert_allclose(encode_images(*blip, path), of_paths[0], atol=1e-5)
    np.testing.assert_allclose(encode_images(*blip, [path] * 3, num_workers=1)[2], of_paths[0], atol=1e-5)
    assert encode_images(*blip, []).shape == (0, 64)


def test_texts_of_any_length_keep_their_order(blip):
    texts = ["red seven", "blue nine green seven white one " * 3, "red"]
    together = encode_texts(*blip, texts, batch_size=2)
    for text, embedding in zip(texts, together):
        np.testing.assert_allclose(encode_texts(*blip, text), embedding, atol=1e-5)


def test_a_text_that_is_too_long_is_an_error_or_truncated_on_request(blip, index, caplog):
    warning_once.cache_clear()
    longest = blip[0].config.text_config.max_position_embeddings
    texts, message = ["seven " * longest, "red"], f"{longest + 2} tokens long: this model reads at most {longest}"
    with pytest.raises(ValueError, match=rf"{message}\..*truncation=True"):
        encode_texts(*blip, texts)
    with pytest.raises(ValueError, match=rf"{message}\. Shorten it\.$"):
        search(index, texts[0], model=blip[0], processor=blip[1])
    found = encode_texts(*blip, texts, truncation=True)
    assert caplog.text.count(f"more than {longest} tokens") == 1
    np.testing.assert_allclose(found[0], encode_texts(*blip, "seven " * (longest - 2)), atol=1e-5)


def test_embeddings_of_clip_are_its_normalised_features(photos):
    model, processor = make_clip_model(), make_clip_processor()
    pixels = processor.image_processor(images=Image.open(photos / "00.png"), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    np.testing.assert_allclose(encode_images(model, processor, photos / "00.png"), expected[0].numpy(), atol=1e-5)
    assert encode_texts(model, processor, ["a dog", "cats"]).shape == (2, 16)


def test_a_reduction_prunes_for_the_call_alone(photos):
    model, processor = make_clip_model(), make_clip_processor()
    model.config.pruning_schedule = [[0.5, 3.0]]
    dense = encode_images(model, processor, photos / "00.png")
    pruned = encode_images(model, processor, photos / "00.png", reduction=0.5)
    assert not model.is_pruning and np.abs(dense - pruned).max() > 1e-3


def test_an_image_or_a_model_that_will_not_do_is_named(blip, photos):
    (photos / "bad.jpg").write_text("no")
    with pytest.raises(ValueError, match=r"Image 1 \(.*bad.jpg\) can't be read: not an image"):
        encode_images(*blip, [photos / "00.png", photos / "bad.jpg"])
    with pytest.raises(TypeError, match="MadtpBlipForQuestionAnswering: expected MadtpBlipForImageTextRetrieval"):
        encode_images(make_task_model("vqa"), blip[1], [photos / "00.png"])


@pytest.mark.parametrize("size", [(1, 1), (40, 1), (40, 3), (3, 40)])
def test_an_image_of_one_or_three_rows(blip, size):
    assert encode_images(*blip, Image.new("RGB", size, "red")).shape == (64,)


# The index


def test_a_caption_finds_its_scene_and_an_image_itself(index, photos, scenes):
    for row in (3, 8):
        assert name_of(search(index, caption(scenes, row), top_k=3)[0]) == f"{row:02}"
    hits = search(index, photos / "04.png", top_k=4)
    assert name_of(hits[0]) == "04" and hits[0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert [hit["matching"] for hit in hits] == [None] * 4
    assert name_of(search(index, Image.open(photos / "04.png"))[0]) == "04"
    assert len(search(index, "red", top_k=100, rerank=False)) == NUMBER


def test_results_are_those_of_brute_force(index, blip, scenes):
    images = encode_images(*blip, [index.path(row) for row in range(len(index))])
    queries = [caption(scenes, row) for row in range(6)]
    for query, hits in zip(queries, search(index, queries, top_k=5, rerank=False)):
        products = images @ encode_texts(*blip, query)
        assert [hit["path"] for hit in hits] == [index.path(row) for row in np.argsort(-products)[:5]]
        np.testing.assert_allclose([hit["similarity"] for hit in hits], np.sort(products)[::-1][:5], atol=1e-5)


def test_re_ranking_is_by_the_matching_head(index, blip, scenes):
    model, processor = blip
    query = caption(scenes, 5)
    hits = search(index, query, top_k=6)
    text = processor.tokenizer([query], return_tensors="pt")
    for hit in hits:
        pixels = processor.image_processor(images=Image.open(hit["path"]), return_tensors="pt").pixel_values
        with torch.no_grad():
            score = model(text.input_ids, pixels, attention_mask=text.attention_mask).itm_score[0, 1].item()
        assert hit["matching"] == pytest.approx(score, abs=1e-3)
        assert hit["score"] == pytest.approx(score + hit["similarity"], abs=1e-3)
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    # The shortlist may be longer than what is wanted, or shorter.
    assert search(index, query, top_k=2, rerank=NUMBER)[0]["score"] >= hits[0]["score"]
    hits = search(index, query, top_k=4, rerank=2)
    for name in ("matching", "score"):  # no score of another kind among them
        assert [hit[name] is None for hit in hits] == [False, False, True, True]


def test_an_image_that_is_gone_since_is_found_and_not_re_ranked(index, photos, scenes):
    (photos / "04.png").unlink()
    hits = search(index, caption(scenes, 4), top_k=3)
    assert name_of(hits[-1]) == "04" and hits[-1]["matching"] is None


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_other_kinds_of_index(blip, photos, tmp_path, scenes, kind):
    folder = tmp_path / kind
    index_images(*blip, photos, folder, kind=kind)
    assert name_of(search(folder, caption(scenes, 3), rerank=False, model=blip[0], processor=blip[1])[0]) == "03"
    before = index_images(*blip, photos, tmp_path / "flat")
    again = index_images(*blip, photos, folder)  # as flat, from the embeddings that are there
    assert (again.kept, again.embedded) == (NUMBER, 0)
    np.testing.assert_allclose(
        again.vectors.reconstruct_n(0, NUMBER), before.vectors.reconstruct_n(0, NUMBER), atol=1e-5
    )


def test_again_embeds_only_what_is_new_or_changed(blip, photos, tmp_path, index, scenes, monkeypatch):
    (photos / "00.png").unlink()
    Image.fromarray(scenes.images[0]).save(photos / "02.png", compress_level=0)
    (photos / "new.jpg").write_bytes((photos / "04.png").read_bytes())
    (photos / "bad.gif").write_bytes(b"GIF89a broken")
    opened = []

    def noted(path, *options):
        opened.append(Path(path).name)
        return read_image(path, *options)

    monkeypatch.setattr("madtp_hf.jobs.reading.read_image", noted)
    again = index_images(*blip, photos, tmp_path / "index")
    assert sorted(opened) == ["02.png", "bad.gif", "new.jpg"]
    assert (again.embedded, again.kept, again.removed, len(again)) == (2, NUMBER - 2, 1, NUMBER)
    assert list(again.info["unreadable"]) == ["bad.gif"]
    assert name_of(search(tmp_path / "index", caption(scenes, 0), 1, model=blip[0], processor=blip[1])[0]) == "02"
    assert len(list((tmp_path / "index").iterdir())) == 4  # nothing of the index before is left


def test_an_interrupted_run_is_gone_on_with(blip, photos, tmp_path, index, monkeypatch):
    def stops(worker, batch, of=ImageEmbedder.__call__):
        if batch.rows[0] >= 10:
            raise KeyboardInterrupt
        return of(worker, batch)

    for folder, number in ((tmp_path / "new", None), (tmp_path / "index", NUMBER)):
        with monkeypatch.context() as patch:
            patch.setattr(ImageEmbedder, "__call__", stops)
            with pytest.raises(KeyboardInterrupt, match=f"10 of {NUMBER} rows are kept"):
                index_images(*blip, photos, folder, batch_size=5, force=True)
        if number is None:
            with pytest.raises(FileNotFoundError, match="is not an index"):
                load_index(folder)
        else:  # the last good one
            assert len(load_index(folder)) == number
        again = index_images(*blip, photos, folder, batch_size=5)
        assert (again.kept, again.embedded) == (10, NUMBER - 10)


def test_a_failed_write_leaves_the_index_as_it_was(blip, photos, tmp_path, index, monkeypatch):
    (photos / "00.png").unlink()

    def content():
        return {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir() if path.is_file()}

    def fails(*_):
        raise OSError("No space left on device")

    before = content()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="No space"):
            index_images(*blip, photos, tmp_path / "index")
    assert content() == before
    assert len(index_images(*blip, photos, tmp_path / "index")) == NUMBER - 1


def test_a_text_file_of_paths(blip, photos, tmp_path):
    (photos / "list.txt").write_text("more/01.png\n\nmissing.png\nmore/01.png\n" + str(photos / "02.png") + "\n")
    index = index_images(*blip, photos / "list.txt", tmp_path / "index")
    assert index.names == ["more/01.png", str(photos / "02.png")]
    assert index.info["unreadable"] == {"missing.png": "no such file or directory"}


def test_another_model_is_refused_and_both_are_named(blip, photos, tmp_path, index):
    loaded = load(MODEL, device="cpu")
    other, processor = loaded.model, loaded.processor
    other.config.name_or_path = "org/other"
    with torch.no_grad():
        other.vision_proj.weight += 1e-3
    both = re.escape(str(MODEL.resolve())) + ".*org/other"
    with pytest.raises(ValueError, match=both):
        search(index, "red", model=other, processor=processor)
    with pytest.raises(ValueError, match=both):
        index_images(other, processor, photos, tmp_path / "index")
    assert index_images(other, processor, photos, tmp_path / "index", force=True).embedded == NUMBER
    model = load(MODEL, device="cpu").model
    model.set_pruning(temperature=1.0)
    with pytest.raises(ValueError, match="pruning_method was None, now 'madtp'"):
        index_images(model, processor, photos, tmp_path / "index")


def test_queries_prune_as_the_index_did(photos, tmp_path):
    model, processor = make_clip_model(), make_clip_processor()
    model.config.pruning_schedule = [[0.5, 3.0]]
    index = index_images(model, processor, photos, tmp_path / "index", reduction=0.5)
    (hit,) = search(index, photos / "04.png", top_k=1, model=model, processor=processor)
    assert name_of(hit) == "04" and hit["similarity"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="pruning_method was 'madtp', now None"):
        index_images(model, processor, photos, tmp_path / "index")
    with pytest.raises(ValueError, match="no matching head"):
        search(index, "a dog", rerank=True, model=model, processor=processor)


def test_what_cannot_be_indexed_leaves_nothing(blip, photos, tmp_path, index):
    (tmp_path / "none").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_text("no")
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    Image.new("RGB", (9, 9)).save(elsewhere / "other.png")
    (photos / "notes.md").write_text("neither a list nor a table")
    for images, folder, message in (
        (tmp_path / "none", "new", "holds no image"),
        (tmp_path / "missing", "new", "There is no"),
        (tmp_path / "broken", "new", r"None of the 1 images can be read \(not an image"),
        (photos / "notes.md", "new", "unsupported table format .md"),
        (photos, "photos", "is not empty and not an index"),
        (elsewhere, "index", "none of its rows is in"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            index_images(*blip, images, tmp_path / folder)
    assert not (tmp_path / "new" / "index.json").exists() and len(load_index(tmp_path / "index")) == NUMBER
    next((tmp_path / "index").glob("*.faiss")).write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged"):
        load_index(tmp_path / "index")


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_index_and_search_by_command(photos, tmp_path, scenes):
    (photos / "bad.jpg").write_text("no")
    made = invoke("index", MODEL, photos, tmp_path / "index", "--workers", 0, "--device", "cpu")
    assert made.exit_code == 3, made.stderr  # bad.jpg
    assert f"{NUMBER} embedded, 0 kept, 0 dropped, 1 unreadable" in made.stdout
    assert "left out: bad.jpg: not an image" in made.stderr

    found = invoke("search", tmp_path / "index", caption(scenes, 3), "-k", 3, "--json", "--device", "cpu")
    hits = json.loads(found.stdout)
    assert name_of(hits[0]) == "03" and len(hits) == 3 and hits[0]["matching"] is not None
    table = invoke("search", tmp_path / "index", photos / "04.png", "-k", 2, "--device", "cpu").stdout
    assert "1.0000" in table and "04.png" in table.replace("\n", "") and "matching" not in table

    other = invoke("search", tmp_path / "index", "red", "--model", MODEL.parent / "blip-vqa-digits")
    assert other.exit_code == 1 and "Traceback" not in other.stderr
    assert "blip-vqa-digits" in other.stderr and "made by" in other.stderr and "blip-retrieval-digits" in other.stderr
    missing = invoke("search", tmp_path / "index", photos / "nowhere.png", "--device", "cpu")
    assert missing.exit_code == 1 and "nowhere.png) can't be read: no such file" in missing.stderr
    none = invoke("search", photos, "red")
    assert none.exit_code == 1 and none.stderr.strip().count("\n") == 0 and "is not an index" in none.stderr


def test_an_index_of_embeddings_is_that_of_the_images(blip, photos, tmp_path, index, scenes):
    (photos / "bad.jpg").write_text("no")
    embedded = invoke("embed", MODEL, photos, tmp_path / "e.parquet", "--workers", 0, "--device", "cpu")
    assert embedded.exit_code == 3, embedded.stderr
    made = invoke("index", MODEL, tmp_path / "e.parquet", tmp_path / "other", "--device", "cpu")
    assert made.exit_code == 0 and f"{NUMBER} images; 0 embedded" in made.stdout, made.output
    other = load_index(tmp_path / "other")
    assert [other.path(row) for row in range(NUMBER)] == [index.path(row) for row in range(NUMBER)]
    vectors = [one.vectors.reconstruct_n(0, NUMBER) for one in (other, index)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
    assert name_of(search(other, caption(scenes, 3), 1, model=blip[0], processor=blip[1])[0]) == "03"
    refused = invoke("index", MODEL, tmp_path / "e.parquet", tmp_path / "index", "--device", "cpu")
    assert refused.exit_code == 1 and "was started with other settings" in refused.stderr
    make_clip_model().save_pretrained(tmp_path / "clip")
    make_clip_processor().save_pretrained(tmp_path / "clip")
    refused = invoke("index", tmp_path / "clip", tmp_path / "e.parquet", tmp_path / "third", "--device", "cpu")
    assert refused.exit_code == 1 and "made by" in refused.stderr and "this is " in refused.stderr
    assert not (tmp_path / "third").exists()


def test_names_that_are_not_utf8_and_embeddings_that_are_not_numbers(photos, tmp_path, monkeypatch):
    model, processor = make_clip_model(), make_clip_processor()
    name = os.path.join(os.fsencode(photos), b"\xff.png")
    with open(name, "wb") as file:
        file.write((photos / "00.png").read_bytes())
    index = index_images(model, processor, photos, tmp_path / "index")
    assert len(index) == NUMBER + 1 and load_index(tmp_path / "index").names == index.names
    paths = [hit["path"] for hit in search(index, photos / "00.png", 2, model=model, processor=processor)]
    assert os.fsdecode(name) in paths and os.path.isfile(paths[0]) and os.path.isfile(paths[1])
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"None of the 25 images can be read \(the model's result is not a number"):
        index_images(model, processor, photos, tmp_path / "nan")


def test_the_pruning_of_a_saved_checkpoint_is_recorded(photos, tmp_path):
    model = make_clip_model()
    model.config.pruning_schedule = [[0.5, 3.0]]
    model.set_pruning(reduction=0.5)
    model.save_pretrained(tmp_path / "clip")
    make_clip_processor().save_pretrained(tmp_path / "clip")
    for options, reduction, note in (
        ((), None, "as saved (madtp, temperature 3"),
        (("--reduction", 0), 0, "reduction 0 (off)"),
    ):
        folder = tmp_path / f"index{reduction}"
        made = invoke("index", tmp_path / "clip", photos, folder, "--workers", 0, *options)
        assert made.exit_code == 0 and f"pruning: {note}" in made.stdout
        info = json.loads((folder / "index.json").read_text())
        assert info["reduction"] == reduction and info["pruning"].startswith(note)
        assert (info["pruning_setting"] is None) == (reduction == 0)


def test_a_second_writer_is_refused_and_damages_nothing(blip, photos, tmp_path, index):
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX);"
            "print('held', flush=True);"
            "sys.stdin.read()",
            tmp_path / "index" / "job" / "lock",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="Another process is writing"):
        index_images(*blip, photos, tmp_path / "index")
    held.communicate("")
    assert len(index_images(*blip, photos, tmp_path / "index")) == NUMBER


@pytest.mark.parametrize("command", ["index", "search", "embed"])
def test_help_fits_a_screen_and_imports_no_torch(command):
    code = (
        "import sys; from typer.testing import CliRunner; from madtp_hf_cli import app;"
        f"print(CliRunner().invoke(app, ['{command}', '--help']).stdout); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "COLUMNS": "100"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 0, run.stderr
    assert "Example: madtp-hf " + command in run.stdout
    assert len(run.stdout.splitlines()) <= 45
