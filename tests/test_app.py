"""The page that shows what a pruned model drops: its functions, and the page itself in a browser without a window."""

import base64
import importlib.util
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from madtp_hf.serving import page
from madtp_hf.serving.page import check_shown, cost_html, layers_to_draw, look, make_app

from .conftest import make_processor, make_task_model


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
SCHEDULE = [[0.2, 0.3], [0.5, 3.0], [0.7, 30.0]]
QUESTION = "how many sevens are there?"
# Of a browser that asks the network for nothing.
BROWSER = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1240,1400"
).split()


def picture(seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8))


def pruned_model(task="vqa"):
    return make_task_model(task, {"pruning_schedule": SCHEDULE})


@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_a_look_is_what_the_model_says(task, processor, monkeypatch):
    monkeypatch.setattr("madtp_hf.serving.page.TIMED_SECONDS", 0.0)
    model = pruned_model(task)
    found = look(model, processor, picture(), QUESTION, 0.6)
    assert not model.is_pruning
    inputs = {"pixel_values": processor.image_processor(images=picture(), return_tensors="pt").pixel_values}
    if task == "vqa":
        inputs |= processor.tokenizer(QUESTION, return_tensors="pt")
    for run, reduction in ((found.dense, None), (found.pruned, 0.6)):
        model.set_pruning(reduction=reduction)
        written = model.generate(**{k: v for k, v in inputs.items() if k != "token_type_ids"}, max_new_tokens=10)
        answer = processor.tokenizer.decode(written[0], skip_special_tokens=True).strip()
        assert run.text[: len(answer)] == answer
        assert run.seconds > 0
    assert found.survivors.patches[0, 0].all() and not found.survivors.patches[0, -1].all()
    assert (found.survivors.words is None) == (task == "captioning")
    assert found.pruned.gflops < found.dense.gflops
    assert "dense" in cost_html(found)


def test_a_click_is_timed_several_times_after_a_warm_up(monkeypatch):
    monkeypatch.setattr(page, "TIMED_SECONDS", 0.0)
    model, calls, clock = pruned_model(), [], iter(range(1000))
    # A slow machine: a warm-up takes 100 seconds, the calls after it 0, 1, 2, ...
    now = [0]

    def write():
        calls.append(1)
        now[0] += 100 if len(calls) <= 2 else next(clock)

    monkeypatch.setattr(page, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert page._time_in_turns(model, write, [0.0, 0.5]) == [2, 3]  # medians of 0, 2, 4 and of 1, 3, 5
    assert len(calls) == 8


def test_a_larger_reduction_leaves_fewer_patches(processor, monkeypatch):
    monkeypatch.setattr("madtp_hf.serving.page.TIMED_SECONDS", 0.0)
    model = pruned_model()
    left = [
        look(model, processor, picture(), QUESTION, reduction).survivors.patches[0, -1].sum()
        for reduction in (0.2, 0.37, 0.7)
    ]
    assert left[0] > left[2] and left[0] >= left[1] >= left[2]
    with pytest.raises(ValueError, match="outside what this model's schedule covers"):
        look(model, processor, picture(), QUESTION, 0.9)
    with pytest.raises(ValueError, match="The question is empty"):
        look(model, processor, picture(), " ", 0.5)
    with pytest.raises(ValueError, match=r"62 tokens long: this model reads at most \d+\. Shorten it\.$"):
        look(model, processor, picture(), "seven " * 60, 0.5)


def test_what_a_model_writes_is_escaped(processor, monkeypatch):
    monkeypatch.setattr("madtp_hf.serving.page.TIMED_SECONDS", 0.0)
    found = look(pruned_model(), processor, picture(), QUESTION, 0.5)
    shown = cost_html(found._replace(pruned=found.pruned._replace(text="<script>")))
    assert "&lt;script&gt;" in shown and "<script>" not in shown


@pytest.mark.parametrize("number", [1, 2, 3, 6, 7, 12, 24])
def test_layers_to_draw_are_the_models(number):
    layers = layers_to_draw(number)
    assert layers == sorted(set(layers)) and layers[-1] == number and len(layers) == min(number, 6)
    assert layers[0] == 1


def test_models_that_cannot_be_shown_are_named():
    model = pruned_model()
    check_shown(model.task, model.config, "good")
    with pytest.raises(ValueError, match=r"dense has no calibrated schedule.*calibrate"):
        check_shown("vqa", make_task_model("vqa").config, "dense")
    with pytest.raises(ValueError, match="tiny is a model for retrieval: expected one for vqa or captioning"):
        check_shown("retrieval", pruned_model("retrieval").config, "tiny")


def test_the_page_answers_and_says_what_is_wrong(processor, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the app needs gradio")
    pytest.importorskip("matplotlib", reason="the app needs matplotlib")
    monkeypatch.setattr("madtp_hf.serving.page.TIMED_SECONDS", 0.0)
    model = pruned_model()
    app = make_app(model, processor, [(picture(), QUESTION)], "tiny")
    show = next(function.fn for function in app.fns.values() if function.fn.__name__ == "show")
    answer, words, figure, patches = show(picture(), QUESTION, 0.5)
    assert "GFLOPs" in answer and "sevens" not in answer
    assert "many" in words
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["image tokens", "text tokens"]
    assert len(figure.axes[0].patches) == 5 and patches.width > patches.height
    for arguments, message in (
        ((None, QUESTION, 0.5), "There is no image"),
        ((picture(), "", 0.5), "The question is empty"),
        ((picture(), QUESTION, 0.9), "outside"),
    ):
        with pytest.raises(gradio.Error, match=message):
            show(*arguments)


def test_the_page_has_the_limits_of_an_endpoint(processor, monkeypatch, tmp_path):
    gradio = pytest.importorskip("gradio", reason="the app needs gradio")
    pytest.importorskip("matplotlib", reason="the app needs matplotlib")
    from .test_endpoint_requests import eps, png

    app = make_app(pruned_model(), processor)
    show = next(function.fn for function in app.fns.values() if function.fn.__name__ == "show")
    images = [block for block in app.blocks.values() if isinstance(block, gradio.Image)]
    upload = next(image for image in images if image.interactive is not False)
    bomb, postscript = base64.b64decode(png(13_000, 13_000)), base64.b64decode(eps())
    content = {"bomb": bomb, "eps": postscript, "large": bytes(10_000_001)}
    for name, message in (
        ("bomb", "13000 x 13000 pixels, more than the limit of 12500000"),
        ("eps", "not an image, or of an unknown format"),
        ("large", "has 10,000,001 bytes: expected at most 10,000,000"),
    ):
        path = tmp_path / f"{name}.png"
        path.write_bytes(content[name])
        if name == "bomb":  # gradio gives the path, and decodes nothing
            assert upload.preprocess(gradio.data_classes.ImageData(path=str(path), orig_name=path.name)) == str(path)
        with pytest.raises(gradio.Error, match=message):
            show(str(path), QUESTION, 0.5)
    with pytest.raises(gradio.Error, match="question has 2,001 characters: expected at most 2,000"):
        show(picture(), "a" * 2001, 0.5)
    monkeypatch.setenv("MADTP_MAX_PIXELS", "2000")
    app = make_app(pruned_model(), processor)
    show = next(function.fn for function in app.fns.values() if function.fn.__name__ == "show")
    with pytest.raises(gradio.Error, match="48 x 48 pixels, more than the limit of 2000"):
        show(picture(), QUESTION, 0.5)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver", reason="the browser is steered with selenium")
    service = pytest.importorskip("selenium.webdriver.chrome.service", reason="the browser is steered with selenium")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("chromium or chromedriver is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = paths[0]
    for argument in (*BROWSER, f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(argument)
    driver = selenium.Chrome(options=options, service=service.Service(paths[1]))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_in_a_browser_the_picture_changes_with_the_reduction(browser, monkeypatch):
    pytest.importorskip("gradio", reason="the app needs gradio")
    pytest.importorskip("matplotlib", reason="the app needs matplotlib")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    monkeypatch.setattr("madtp_hf.serving.page.TIMED_SECONDS", 0.0)
    app = make_app(pruned_model(), make_processor(), [(picture(), QUESTION), (picture(1), "what color?")], "tiny")
    wait = WebDriverWait(browser, 60)

    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def patches():
        found = browser.find_elements(By.CSS_SELECTOR, "#patches img")
        return found[0].get_attribute("src") if found else None

    def changed(before):
        wait.until(lambda _: patches() not in (None, before))
        return patches()

    try:
        _, url, _ = app.launch(prevent_thread_lock=True, server_name="127.0.0.1", server_port=free_port(), quiet=True)
        browser.get(url)
        first = changed(None)  # of the first example, without a click
        assert "many" in find("#words").text and "GFLOPs" in find("#answer").text
        question = find("#question textarea")
        question.clear()
        question.send_keys("is there a three in the image?")
        find("#run").click()
        wait.until(lambda _: "three" in find("#words").text)
        asked = patches()
        slider = find("#reduction input[type=range]")
        slider.send_keys(Keys.HOME)
        least = changed(asked)
        slider.send_keys(Keys.END)
        most = changed(least)
        assert len({least, most}) == 2 and first
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        app.close()


def load_example():
    specification = importlib.util.spec_from_file_location(
        "app_example", Path(__file__).parent.parent / "examples" / "app.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The schedule rests on")
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_the_example_makes_a_model_to_show(task):
    pytest.importorskip("sklearn", reason="the digit scenes need scikit-learn")
    model, processor = load_example().prune_digit_model(task, num_samples=64)
    row = next(iter(load_example().digit_examples(1)))
    found = look(model, processor, *row, model.config.calibrated_reductions[-1])
    assert 1 - found.pruned.gflops / found.dense.gflops > 0.5
    assert found.pruned.text
