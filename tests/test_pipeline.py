"""What can be given to the question answering pipeline, and what it says to the rest."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import make_task_model


QUESTIONS = ["how many sevens are there?", "is there a seven?", "which digit?"]


def picture(seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 70, 3), dtype=np.uint8))


@pytest.fixture
def ask(processor):
    return make_task_model("vqa").as_pipeline(processor, max_new_tokens=2)


def scores(answers) -> list[float]:
    return [answer["score"] for of_question in answers for answer in of_question]


def test_an_image_is_a_file_a_path_an_array_or_pil(ask, tmp_path):
    picture().save(tmp_path / "image.png")
    expected = ask(image=picture(), question=QUESTIONS[0])
    for image in (tmp_path / "image.png", str(tmp_path / "image.png"), np.array(picture())):
        assert ask(image=image, question=QUESTIONS[0]) == expected
        assert ask({"image": image, "question": QUESTIONS[0]}) == expected
        assert ask(image=[image], question=QUESTIONS[0]) == [expected]


def test_a_path_is_turned_upright(ask, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "turned.png", exif=exif)
    upright = picture().transpose(Image.Transpose.ROTATE_270)
    expected = ask(image=upright, question=QUESTIONS[0])
    assert ask(image=tmp_path / "turned.png", question=QUESTIONS[0]) == expected
    assert expected != ask(image=picture(), question=QUESTIONS[0])


def test_two_lists_are_every_question_about_every_image(ask):
    images = [picture(0), picture(1)]
    answers = ask(image=images, question=QUESTIONS)
    expected = [ask(image=image, question=question) for question in QUESTIONS for image in images]
    assert scores(answers) == pytest.approx(scores(expected), rel=1e-4) and len(answers) == 6
    assert scores(ask(image=tuple(images), question=tuple(QUESTIONS))) == scores(answers)


def test_pairs_are_a_list_of_dicts_or_a_dict_of_lists(ask):
    images = [picture(seed) for seed in range(3)]
    expected = scores(ask(image=image, question=question) for image, question in zip(images, QUESTIONS))
    pairs = [{"image": image, "question": question} for image, question in zip(images, QUESTIONS)]
    columns = {"image": images, "question": QUESTIONS, "answer": ["one", "yes", "no"]}
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for given in (pairs, tuple(pairs), columns, data[:3], data, iter(pairs)):
        assert scores(ask(given)) == pytest.approx(expected, rel=1e-4)


IMAGE = picture()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([], "how many?"), ValueError, "image is an empty list"),
        ((IMAGE, []), ValueError, "question is an empty list"),
        (([],), ValueError, "list is empty.*image.*question"),
        ((IMAGE, 5), TypeError, "question is a int: expected a string"),
        ((IMAGE, ["how many?", 5]), TypeError, r"question\[1\] is a int: expected a string"),
        ((5, "how many?"), TypeError, "image is a int: expected a PIL image"),
        (([IMAGE, None], "how many?"), TypeError, r"image\[1\] is a NoneType: expected a PIL image"),
        (({"image": IMAGE}, "how many?"), TypeError, "image is a dict: expected a PIL image"),
        (({"image": IMAGE, "text": "how many?"},), ValueError, r"keys \['image', 'text'\] and no question"),
        (([{"image": IMAGE, "question": "how many?"}, {"img": 5}],), ValueError, r"item 1 .*\['img'\] and no image"),
        (([IMAGE],), TypeError, "item 0 of the list is a Image: expected a dict"),
        (({"image": 5, "question": "how many?"},), TypeError, "image of the dict is a int"),
        (({"image": [IMAGE, IMAGE], "question": ["how many?"]},), ValueError, r"2 image\(s\) and 1 question\(s\)"),
        (({"image": IMAGE, "question": ["how many?"]},), TypeError, "question of the dict is a list: expected a str"),
        ((5,), TypeError, "got a int: expected image="),
        ((np.zeros((4, 4), dtype=np.uint8), "how many?"), ValueError, r"shape \(4, 4\).*\(height, width, 3\)"),
        ((np.zeros((4, 4, 3)), "how many?"), ValueError, "float64.*uint8"),
        ((torch.zeros(3, 4, 4), "how many?"), TypeError, r"image\[0\] is a Tensor: expected a PIL image"),
        ((np.zeros((4, 4, 3), dtype=np.uint8),), ValueError, "question is missing"),
        (("missing.png", "how many?"), ValueError, "'missing.png' can't be read: no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_named(ask, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        ask(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_files_that_are_no_images_are_named(ask, tmp_path):
    with pytest.raises(ValueError, match=r"missing.png can't be read: no such file"):
        ask(image=tmp_path / "missing.png", question=QUESTIONS[0])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text.png can't be read: not an image"):
        ask(image=tmp_path / "text.png", question=QUESTIONS[0])
    with pytest.raises(ValueError, match="can't be read") as caught:  # what was given isn't printed in full
        ask(image="A" * 5000, question=QUESTIONS[0])
    assert len(str(caught.value)) < 500
