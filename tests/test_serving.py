"""A checkpoint's own pipelines and endpoint handler, where this package cannot be imported."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from madtp_hf import push_checkpoint
from madtp_hf.checkpoints.push import find_checkpoint_files, save_handler
from madtp_hf.serving import endpoint_handler
from madtp_hf_cli import app

from .conftest import make_processor, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor
from .test_checkpoint import PIPELINES, run


SCHEDULE = [[0.4, 1.0], [0.6, 4.0]]
TEXTS = ["is there a seven?", "how many sevens are there, one or two?"]


def picture(seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 70, 3), dtype=np.uint8))


def as_base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


# Of each task, what its pipeline is asked, images by number.
ASKED = {
    "vqa": {"image": 0, "question": TEXTS[0]},
    "captioning": {"image": 0, "prompt": "the seven"},
    "nlvr2": {"images": [0, 1], "text": TEXTS[0]},
    "retrieval": {"image": 0, "text": TEXTS},
    "clip": {"image": 0, "candidate_labels": ["cat", "dog"]},
}


def with_images(asked: dict, made) -> dict:
    def read(value):
        return [read(item) for item in value] if isinstance(value, list) else made(picture(value))

    return {key: read(value) if key.startswith("image") else value for key, value in asked.items()}


def same(mine, theirs) -> bool:
    """To rounding, as two copies of a model lie differently in memory."""
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    return mine == pytest.approx(theirs, abs=1e-4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A saved checkpoint of each task, with a handler beside it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for task in ASKED:
        changes = {"pruning_schedule": SCHEDULE}
        model = make_clip_model(changes) if task == "clip" else make_task_model(task, changes)
        model.set_pruning(reduction=0.5)
        model.save_pretrained(folder / task)
        (make_clip_processor() if task == "clip" else make_processor()).save_pretrained(folder / task)
        save_handler(folder / task)
    return folder


@pytest.fixture(scope="module")
def expected():
    """What the models answer in this process, as saved and at another reduction."""
    answers = {}
    for task, asked in ASKED.items():
        if task == "clip":
            model = make_clip_model({"pruning_schedule": SCHEDULE})
            parts = {
                "tokenizer": make_clip_processor().tokenizer,
                "image_processor": make_clip_processor().image_processor,
            }
            asks = pipeline("zero-shot-image-classification", model=model, **parts)
        else:
            model = make_task_model(task, {"pruning_schedule": SCHEDULE})
            asks = model.as_pipeline(make_processor())
        of_task = []
        for reduction in (0.5, 0.6):
            model.set_pruning(reduction=reduction)
            given = with_images(asked, lambda image: image)
            of_task.append(asks(given.pop("image"), **given) if task == "clip" else asks(given))
        answers[task] = of_task
    return answers


def test_all_answer_without_the_package(checkpoints, expected, tmp_path):
    for number in (0, 1):
        picture(number).save(tmp_path / f"{number}.png")
    requests = {task: with_images(asked, as_base64) for task, asked in ASKED.items()}
    names = {as_base64(picture(number)): str(tmp_path / f"{number}.png") for number in (0, 1)}
    by_path = {task: with_images(asked, lambda image: names[as_base64(image)]) for task, asked in ASKED.items()}
    (tmp_path / "asked.json").write_text(json.dumps([requests, by_path, PIPELINES]))
    found = run(
        """
import importlib.util, os
requests, by_path, pipelines = json.load(open(task))
answers = {}
for name, request in requests.items():
    path = os.path.join(folder, name)
    spec = importlib.util.spec_from_file_location("handler", os.path.join(path, "handler.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(path)
    answers[name] = [
        handler({"inputs": request}),
        handler({"inputs": request, "parameters": {"reduction": 0.6}}),
        handler({"inputs": [request, request]}),
        handler({**request, "parameters": {"reduction": 0.5}}),
    ]
    if name in pipelines:
        asks = pipeline(pipelines[name], model=path, trust_remote_code=True)
        assert type(asks).__module__.startswith("transformers_modules"), type(asks)
        answers[name] += [asks(by_path[name]), asks([by_path[name]] * 3, batch_size=2)]
caption = pipeline("image-text-to-text", model=os.path.join(folder, "captioning"), trust_remote_code=True)
given = by_path["captioning"]
answers["stock"] = caption(given["image"], text=given["prompt"], max_new_tokens=20)
print("RESULT" + json.dumps(answers))
""",
        checkpoints,
        tmp_path / "asked.json",
        cache=tmp_path / "modules",
    )
    for task in ASKED:
        as_saved, more = expected[task]
        assert same(found[task][0], as_saved) and same(found[task][1], more), task
        assert not same(as_saved, more) or task == "captioning"  # text alone can be the same
        assert same(found[task][2], [as_saved, as_saved])  # and the reduction of a request is forgotten behind it
        assert same(found[task][3], as_saved)
        if task in PIPELINES:
            assert same(found[task][4], as_saved) and same(found[task][5], [as_saved] * 3)
    assert found["stock"][0]["generated_text"] == expected["captioning"][0][0]["generated_text"]


def test_a_checkpoint_carries_what_its_code_imports_and_no_more(checkpoints):
    for task in ASKED:
        names = {path.name for path in (checkpoints / task).iterdir()}
        assert set(find_checkpoint_files(checkpoints / task)) == names
        assert ("pipeline_madtp_blip.py" in names) == (task != "clip") and "handler.py" in names


@pytest.fixture(scope="module")
def handler(checkpoints):
    return endpoint_handler.EndpointHandler(str(checkpoints / "vqa"))


def test_images_of_a_request_come_in_several_forms(handler):
    image, text = picture(), as_base64(picture())
    file, wrapped = base64.b64decode(text), "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    answer = handler({"inputs": {"image": image, "question": TEXTS[0]}})
    for given in (text, wrapped, f"data:image/png;base64,{text}", file, bytearray(file)):
        assert handler({"inputs": {"image": given, "question": TEXTS[0]}}) == answer


@pytest.mark.parametrize(
    "given", ["/etc/hostname", "seven.png", 5, None, b"no image", base64.b64encode(b"no image").decode(), "A" * 401]
)
def test_what_is_no_image_is_named_and_no_path_is_read(given, handler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save("seven.png")
    with pytest.raises(ValueError, match=r"expected (base64 of an image file|PNG, JPEG, WEBP, GIF)") as caught:
        handler({"inputs": {"image": given, "question": TEXTS[0]}})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_handler_loads_a_folder_and_nothing_from_the_hub():
    with pytest.raises(
        FileNotFoundError, match=r"org/name/config.json does not exist: expected the folder of a checkpoint"
    ):
        endpoint_handler.EndpointHandler("org/name")


def test_push_adds_a_handler(hub, checkpoints, tmp_path):
    model, processor = make_task_model("vqa"), make_processor()
    push_checkpoint(model, processor, "org/plain", token="hf_alice")
    assert "handler.py" not in hub.files("org/plain")
    push_checkpoint(model, processor, "org/served", token="hf_alice", handler=True)
    files = hub.files("org/served")
    assert b"class EndpointHandler" in files["handler.py"] and b"transformers>=5" in files["requirements.txt"]
    shown = CliRunner().invoke(app, ["push", str(checkpoints / "nlvr2"), "org/x", "--dry-run", "--handler"]).stdout
    assert "handler.py" in shown


def test_a_handler_that_is_there_stays(checkpoints, tmp_path):
    model = make_task_model("vqa")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        save_handler(tmp_path)
    make_processor().save_pretrained(tmp_path)
    (tmp_path / "handler.py").write_text("mine = True\n")
    save_handler(tmp_path)
    assert (tmp_path / "handler.py").read_text() == "mine = True\n" and (tmp_path / "requirements.txt").exists()
