"""Pictures of what pruning leaves: what is drawn agrees with what the model counts."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from madtp_hf.budgets.passes import encode
from madtp_hf.serving.visualization import (
    Words,
    draw_surviving_patches,
    draw_surviving_words,
    find_survivors,
    preprocess,
    surviving_words,
    words_as_html,
)

from .conftest import TASKS, make_inputs, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor


TEXTS = ["how many sevens are there?", "red"]
SIZE, GRID = 48, 6  # of a drawn image here, and the model's patches on a side


def picture(seed) -> Image.Image:
    # Dark, so that a dimmed patch is told from a whole one.
    return Image.fromarray(np.random.default_rng(seed).integers(0, 100, (48, 48, 3), dtype=np.uint8))


def make_images(task) -> list:
    images = [picture(seed) for seed in range(4)]
    return [tuple(images[:2]), tuple(images[2:])] if task == "nlvr2" else images[:2]


def cell(canvas, row, column) -> np.ndarray:
    """The image that is drawn in a row and column, 0 the column of the input: (SIZE, SIZE, 3)."""
    top, left = row * (SIZE + 32) + 16, column * (SIZE + 6)
    return np.asarray(canvas)[top : top + SIZE, left : left + SIZE]


def whole_patches(canvas, row, column) -> int:
    """The number of patches that are drawn as they are in the input."""
    same = (cell(canvas, row, column) == cell(canvas, row, 0)).all(axis=2)
    return int(same.reshape(GRID, SIZE // GRID, GRID, SIZE // GRID).all(axis=(1, 3)).sum())


def vision_tokens(model, processor, task) -> np.ndarray:
    """(layers + 1, rows), the images of a pair in turn."""
    images = [np.array(image) for sample in make_images(task) for image in (sample if task == "nlvr2" else [sample])]
    pixel_values = processor.image_processor(images=images, return_tensors="pt").pixel_values
    if task == "nlvr2":
        pixel_values = pixel_values.unflatten(0, (2, 2))
    text = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels = {"labels": make_inputs()["labels"][:2]} if task == "vqa" else {}
    counts = model(
        input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=pixel_values, **labels
    ).vision_tokens
    return (counts.transpose(1, 2).flatten(1) if task == "nlvr2" else counts).numpy()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_drawn(task, processor):
    model = make_task_model(task)
    model.set_pruning(temperature=3.0)
    canvas = draw_surviving_patches(model, processor, make_images(task), TEXTS, size=SIZE)
    rows = 4 if task == "nlvr2" else 2
    assert canvas.size == (5 * (SIZE + 6), rows * (SIZE + 32))
    counts = vision_tokens(model, processor, task)
    flat = [image for sample in make_images(task) for image in (sample if task == "nlvr2" else [sample])]
    pruned = 0
    for row in range(rows):
        np.testing.assert_array_equal(cell(canvas, row, 0), np.asarray(flat[row]))
        for layer in range(1, 5):
            drawn = whole_patches(canvas, row, layer)
            # Of its tokens, the class token isn't drawn, and the merged ones are no patch of the input.
            assert counts[layer, row] - 1 - layer <= drawn <= counts[layer, row] - 1
            pruned += drawn < GRID * GRID
    assert pruned


def test_layer_0_is_all_that_enters(processor):
    model = make_task_model("vqa")
    model.set_pruning(temperature=3.0)
    canvas = draw_surviving_patches(model, processor, make_images("vqa"), TEXTS, layers=[0, 4], size=SIZE)
    for row in range(2):
        assert whole_patches(canvas, row, 1) == GRID * GRID
        np.testing.assert_array_equal(cell(canvas, row, 1), cell(canvas, row, 0))
        assert whole_patches(canvas, row, 2) < GRID * GRID
        label = Image.new("RGB", (SIZE + 6, 16), "white")
        ImageDraw.Draw(label).text((0, 1), "input: 37 tokens", fill="black")  # no layer's
        top = row * (SIZE + 32) + 16 + SIZE
        drawn = canvas.crop((SIZE + 6, top, 2 * (SIZE + 6), top + 16))
        assert drawn == label


def test_paths_are_drawn_upright(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(tmp_path / "turned.png", exif=exif)
    model = make_task_model("vqa")
    canvas = draw_surviving_patches(model, processor, [tmp_path / "turned.png"], TEXTS[:1], size=SIZE)
    upright = picture(0).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(cell(canvas, 0, 0), np.asarray(upright))
    assert canvas == draw_surviving_patches(model, processor, [upright], TEXTS[:1], size=SIZE)


@pytest.mark.parametrize("layers", ([99], [5], [1, -1], [1.5], [True], ["1"]))
def test_a_layer_that_does_not_exist_is_named(processor, layers):
    with pytest.raises(ValueError, match=rf"layers has {layers[-1]!r}: .* 0 \(what enters the encoder\) to 4"):
        draw_surviving_patches(make_task_model("vqa"), processor, make_images("vqa"), TEXTS, layers=layers)


@pytest.mark.parametrize(
    "task, images, texts, layers, message",
    [
        ("vqa", make_images("vqa"), TEXTS, [], "layers is empty: .*to 4"),
        ("vqa", [], [], None, "images is an empty list: expected a list of images"),
        ("vqa", make_images("vqa"), [], None, "questions is an empty list: expected a list of strings"),
        ("vqa", make_images("vqa"), TEXTS[:1], None, "2 images or pairs for 1 questions"),
        ("vqa", picture(0), TEXTS[:1], None, "images is a Image: expected a list of images"),
        ("vqa", make_images("vqa"), "ab", None, "questions is a str: expected a list of strings"),
        (
            "nlvr2",
            make_images("vqa"),
            TEXTS,
            None,
            r"images\[0\] is not a pair: expected a list of pairs \(left image",
        ),
    ],
)
def test_lists_that_do_not_fit_are_named(processor, task, images, texts, layers, message):
    with pytest.raises(ValueError, match=message):
        draw_surviving_patches(make_task_model(task), processor, images, texts, layers=layers)


# CLIP, whose processor crops, and whose texts have a last token that stays.


def test_clip_is_drawn_as_it_is_cropped():
    model, processor = make_clip_model(), make_clip_processor()
    model.set_pruning(temperature=3.0)
    wide = Image.fromarray(np.random.default_rng(5).integers(0, 100, (48, 96, 3), dtype=np.uint8))
    canvas = draw_surviving_patches(model, processor, [wide, picture(1)], ["a red dog", "two cats"], size=SIZE)
    np.testing.assert_array_equal(cell(canvas, 0, 0), np.asarray(wide)[:, 24:72])  # the middle
    assert whole_patches(canvas, 0, 4) < GRID * GRID
    with pytest.raises(ValueError, match="2 images or pairs for 1 questions"):
        draw_surviving_patches(model, processor, [wide, wide], ["a red dog"])


def test_clip_keeps_the_ends_of_a_text():
    model, processor = make_clip_model(), make_clip_processor()
    model.set_pruning(temperature=30.0)
    texts = ["a red dog on a boat", "cat"]
    for words, text in zip(surviving_words(model, processor, make_images("clip"), texts), texts):
        assert words.tokens == processor.tokenizer.tokenize(text, add_special_tokens=True)
        assert words.stays[:, [0, -1]].all()
        assert words.stays[0].all()
    assert not surviving_words(model, processor, make_images("clip"), texts)[0].stays[-1].all()


# Words.


def dropping(task):
    model = make_task_model(task)
    model.set_pruning(temperature=30.0)
    return model


@pytest.mark.parametrize("task", [task for task in TASKS if task != "captioning"])
def test_words_that_stay_agree_with_the_counts(task, processor):
    model = dropping(task)
    found = surviving_words(model, processor, make_images(task), TEXTS)
    batch = preprocess(model, processor, make_images(task), TEXTS)[0]
    counts = encode(model, batch).text_tokens
    for index, words in enumerate(found):
        assert words.tokens == processor.tokenizer.tokenize(TEXTS[index], add_special_tokens=True)
        assert words.stays.shape == (4, len(words.tokens))
        assert words.stays[0].all()
        assert words.stays[:, 0].all()  # what a text begins with
        assert words.counts.tolist() == counts[:, index].tolist()
        dropped = ~words.stays
        assert not (dropped[:-1] & words.stays[1:]).any()  # what is gone does not return
        left = words.stays.sum(dim=1)
        layers = (left.diff() < 0).long().cumsum(dim=0)  # each of which adds a merged token, or merges that again
        assert (words.counts[1:] - left[1:] <= layers).all() and (words.counts >= left).all()
    assert not found[0].stays[-1].all()


def test_what_stays_of_a_text_does_not_depend_on_its_batch(processor):
    model, images = dropping("vqa"), make_images("vqa")
    together = surviving_words(model, processor, images, TEXTS)
    for index in range(2):
        (alone,) = surviving_words(model, processor, images[index : index + 1], TEXTS[index : index + 1])
        assert alone.tokens == together[index].tokens
        assert alone.stays.equal(together[index].stays)


@pytest.mark.parametrize("make", [lambda: make_task_model("vqa"), make_clip_model])
def test_with_pruning_off_all_stay(make, processor):
    model = make()
    processor = make_clip_processor() if model.task == "clip" else processor
    for sample in find_survivors(model, processor, make_images("vqa"), ["how many cats", "red"]):
        assert sample.words.stays.all() and sample.patches.all()


def test_the_table_greys_what_is_dropped(processor):
    model, images = dropping("vqa"), make_images("vqa")
    words = surviving_words(model, processor, images, TEXTS)
    table = draw_surviving_words(model, processor, images, TEXTS, layers=[0])
    later = draw_surviving_words(model, processor, images, TEXTS, layers=[0, 3])
    assert later.width == table.width and later.height == table.height + 2 * 24
    grey = (np.asarray(table) == 200).all(axis=2).sum()
    assert grey < (np.asarray(later) == 200).all(axis=2).sum()  # the line through a word
    markup = words_as_html(words[0], layers=[0, 3])
    assert markup.count("</tr>") == 2
    assert markup.count("<del") == int((~words[0].stays[3]).sum())


def test_words_in_html_are_escaped():
    words = Words(["[CLS]", "<i>"], torch.ones(2, 2, dtype=torch.bool), torch.tensor([2, 2]))
    assert "&lt;i&gt;" in words_as_html(words) and "<i>" not in words_as_html(words)


def test_words_that_cannot_be_drawn_are_named(processor):
    with pytest.raises(ValueError, match="MadtpBlipForConditionalGeneration has no text encoder"):
        surviving_words(make_task_model("captioning"), processor, make_images("vqa"), TEXTS)
    model = make_task_model("vqa")
    with pytest.raises(ValueError, match=r"layers has 4: .*text layers are 0 \(what enters the encoder\) to 3"):
        draw_surviving_words(model, processor, make_images("vqa"), TEXTS, layers=[4])
    with pytest.raises(ValueError, match="2 images or pairs for 3 questions"):
        surviving_words(model, processor, make_images("vqa"), [*TEXTS, "one"])
    with pytest.raises(ValueError, match=r"questions\[1\] is a int: expected a string"):
        surviving_words(model, processor, make_images("vqa"), ["one", 2])
