"""What an endpoint refuses: a request must not read files, reach into the network, run code or take all memory."""

import base64
import http.server
import io
import json
import random
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from madtp_hf.checkpoints.push import save_handler
from madtp_hf.serving import endpoint_handler
from madtp_hf.serving.endpoint_handler import EndpointHandler, Limits, fetch, is_public

from .conftest import make_processor, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor
from .test_serving import SCHEDULE, TEXTS, as_base64, picture


PICTURE = as_base64(picture())
GOOD = {
    "vqa": {"image": PICTURE, "question": TEXTS[0]},
    "captioning": {"image": PICTURE, "prompt": "the seven"},
    "nlvr2": {"images": [PICTURE, as_base64(picture(1))], "text": TEXTS[0]},
    "retrieval": {"image": PICTURE, "text": TEXTS},
    "clip": {"image": PICTURE, "candidate_labels": ["cat", "dog"]},
}


def png(width: int, height: int) -> str:
    """A black image of one bit a pixel, written without its pixels in memory, in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def nested(depth: int) -> list:
    deep = []
    for _ in range(depth):
        deep = [deep]
    return deep


def eps() -> str:
    """A picture in PostScript, which Pillow gives to Ghostscript, a program, to draw."""
    file = io.BytesIO()
    picture().save(file, format="EPS")
    return base64.b64encode(file.getvalue()).decode()


def asking(task="vqa", **parameters) -> dict:
    return {"inputs": GOOD[task], "parameters": parameters}


def generating(**options) -> dict:
    return asking(generate_kwargs=options)


def showing(image) -> dict:
    return {"inputs": {"image": image, "question": TEXTS[0]}}


# A request that is refused: the task, the request and what is said.
HOSTILE = {
    "code": ("vqa", generating(custom_generate="org/evil"), "generate_kwargs has 'custom_generate', which is not"),
    "remote code": ("vqa", generating(trust_remote_code=True), "generate_kwargs has 'trust_remote_code'"),
    "code of captions": (
        "captioning",
        asking("captioning", generate_kwargs={"custom_generate": "org/evil", "trust_remote_code": True}),
        "generate_kwargs has 'custom_generate'",
    ),
    "another model": ("vqa", generating(assistant_model="org/evil"), "generate_kwargs has 'assistant_model'"),
    "processes": ("vqa", asking(num_workers=4), "parameters has 'num_workers', which is not accepted: expected top_k"),
    "a large batch": ("vqa", asking(batch_size=10**6), "parameters has 'batch_size'"),
    "a timeout": ("vqa", asking(timeout=10**6), "parameters has 'timeout'"),
    "a name that is a path": ("vqa", asking(**{"../x": 1}), "parameters has '../x'"),
    "a name that is a number": ("vqa", {"inputs": GOOD["vqa"], "parameters": {5: 1}}, "parameters has 5"),
    "parameters in a list": ("vqa", {"inputs": GOOD["vqa"], "parameters": ["top_k"]}, "parameters is a list"),
    "an unknown part": ("vqa", {"inputs": GOOD["vqa"], "options": {}}, "has 'options': expected only inputs and"),
    "a path": ("vqa", showing("/etc/hostname"), "expected PNG, JPEG|is not base64: expected base64"),
    "a file": ("vqa", showing("file:///etc/hostname"), "is not base64: expected base64"),
    "CLIP's path": ("clip", asking("clip", images="/some/file.png"), "parameters has 'images', which is not"),
    "CLIP's path, as input": (
        "clip",
        {"inputs": {"images": "/some/file.png", "candidate_labels": ["a"]}},
        "input has 'images', which is not",
    ),
    "a URL": ("vqa", showing("http://127.0.0.1/x.png"), "fetches no URLs; its operator can set MADTP_FETCH_URLS=1"),
    "PostScript": ("vqa", showing(eps()), "not an image, or of an unknown format: expected PNG, JPEG"),
    "many pixels": ("vqa", showing(png(13_000, 13_000)), "13000 x 13000 pixels.*: expected .* of at most 12,500,000"),
    "more pixels": ("vqa", showing(png(20_000, 20_000)), "20000 x 20000 pixels"),
    "a large file": ("vqa", showing("A" * 14_000_000), "has 10,500,000 bytes: expected at most 10,000,000; send"),
    "a file in pieces": ("vqa", showing("AA " * 4_400_000), "expected PNG, JPEG"),
    "a large body": ("vqa", {"inputs": [{"image": "A" * 9_000_000}] * 4}, r"request has at least 36,000,\d+ bytes"),
    "a large list": ("vqa", {"inputs": [0] * 1_000_000}, "request has at least 64,000,070 bytes: expected at most"),
    "many inputs": ("vqa", {"inputs": [GOOD["vqa"]] * 33}, "inputs has 33 items: expected at most 32; send less, or"),
    "a deep list": ("vqa", {"inputs": nested(2_000)}, "to a depth of more than 8: expected at most 8"),
    "deep parameters": ("vqa", asking(top_k=nested(2_000)), "to a depth of more than 8"),
    "a list of lists": ("vqa", {"inputs": [[GOOD["vqa"]]]}, "inputs.0.: image is a list: expected base64"),
    "20,000 labels": (
        "clip",
        {"inputs": {"image": PICTURE, "candidate_labels": ["cat"] * 20_000}},
        "candidate_labels has 20,000 items: expected at most 256; send less, or set MADTP_MAX_TEXTS on the server",
    ),
    "20,000 labels, as parameters": (
        "clip",
        {"inputs": PICTURE, "parameters": {"candidate_labels": ["cat"] * 20_000}},
        "candidate_labels has 20,000 items",
    ),
    "20,000 texts": ("retrieval", {"inputs": {"image": PICTURE, "text": ["a"] * 20_000}}, "text has 20,000 items"),
    "a long text": (
        "vqa",
        {"inputs": {"image": PICTURE, "question": "a " * 100_000}},
        "question has 200,000 characters: expected at most 2,000",
    ),
    "a long label": (
        "clip",
        {"inputs": {"image": PICTURE, "candidate_labels": ["cat", "cat " * 400]}},
        r"candidate_labels\[1\] has 1217 tokens in its template: expected at most 24; shorten it",
    ),
    "long labels": (
        "clip",
        {"inputs": {"image": PICTURE, "candidate_labels": ["a" * 2_000] * 256}},
        "tokens in its template: expected at most 24; shorten it",
    ),
    "half a character": ("vqa", {"inputs": {"image": PICTURE, "question": "a \ud800"}}, "a lone surrogate"),
    "no text": ("vqa", {"inputs": {"image": PICTURE, "question": 5}}, "question is 5: expected a string"),
    "no labels": ("clip", {"inputs": {"image": PICTURE, "candidate_labels": []}}, "expected a list of at least one"),
    "labels in a string": ("clip", asking("clip", candidate_labels="cat,dog"), "candidate_labels is 'cat,dog'"),
    "a wide template": ("clip", asking("clip", hypothesis_template="{:>200000000}"), "expected a text with {} once"),
    "a deep template": ("clip", asking("clip", hypothesis_template="{0.__class__}"), "expected a text with {} once"),
    "two labels in a template": ("clip", asking("clip", hypothesis_template="{} {}"), "expected a text with {} once"),
    "a template without a label": ("clip", asking("clip", hypothesis_template="cat"), "with {} once and no other"),
    "10,000 new tokens": ("vqa", asking(max_new_tokens=10_000), "10000: expected a whole number from 1 to 256"),
    "10,000 new tokens, inside": ("vqa", generating(max_new_tokens=10_000), "max_new_tokens is 10000: expected"),
    "1,000 beams": ("vqa", generating(num_beams=1_000), "num_beams is 1000: expected a whole number from 1 to 8"),
    "1,000 answers": ("vqa", asking(top_k=1_000), "top_k is 1000: expected a whole number from 1 to 8"),
    "1,000 captions": (
        "captioning",
        asking("captioning", generate_kwargs={"num_return_sequences": 1_000, "do_sample": True}),
        "num_return_sequences is 1000",
    ),
    "more captions than beams": (
        "captioning",
        asking("captioning", generate_kwargs={"num_return_sequences": 3}),
        "num_return_sequences",
    ),
    "a huge number": ("vqa", asking(top_k=10**5000), "top_k is a number of more than 20 digits"),
    "no number": ("vqa", generating(temperature=float("nan")), "temperature is nan: expected a number from 0.01"),
    "endless": ("vqa", generating(repetition_penalty=float("inf")), "repetition_penalty is inf"),
    "true as a number": ("vqa", asking(top_k=True), "top_k is True: expected a whole number"),
    "a string as a number": ("vqa", asking(max_new_tokens="5"), "max_new_tokens is '5'"),
    "a number as a choice": ("vqa", generating(do_sample=1), "do_sample is 1: expected true or false"),
    "options in a list": ("vqa", asking(generate_kwargs=[1]), "generate_kwargs is a list: expected an object"),
    "too much reduction": ("vqa", asking(reduction=2), "reduction is 2: expected a number from 0 to 1"),
    "reduction beyond the schedule": ("vqa", asking(reduction=0.99), "0.99.* outside"),
    "on any error": ("vqa", asking(on_error="ignore"), 'on_error is .ignore.: expected "raise" or "skip"'),
    "no object": ("vqa", [], "request is a list, empty: expected an object with inputs"),
    "nothing": ("vqa", {}, 'request has no inputs: expected {"image": ..., "question": ...}, or a list'),
    "no question": ("vqa", {"inputs": {"image": PICTURE}}, "input has no question: expected"),
    "no image": ("captioning", {"inputs": {"prompt": "a"}}, "input has no image: expected"),
    "one image": ("nlvr2", {"inputs": {"images": [PICTURE], "text": "a"}}, "images is a list: expected a list of two"),
    "all images": ("vqa", showing([PICTURE] * 2), "image is a list: expected base64"),
}


@pytest.fixture(scope="module")
def handlers(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("endpoints"), {}
    for task in GOOD:
        changes = {"pruning_schedule": SCHEDULE}
        model = make_clip_model(changes) if task == "clip" else make_task_model(task, changes)
        model.set_pruning(reduction=0.5)
        model.save_pretrained(folder / task)
        (make_clip_processor() if task == "clip" else make_processor()).save_pretrained(folder / task)
        save_handler(folder / task)
        found[task] = EndpointHandler(str(folder / task))
    return found


class Peak:
    """The most memory that this process has taken inside a `with` block, above what it had before, in MB."""

    def _status(self, name: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1000

    def __enter__(self):
        self.is_measured = Path("/proc/self/clear_refs").exists()  # Linux
        if self.is_measured:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_):
        self.megabytes = self._status("VmHWM") - self.before if self.is_measured else 0.0


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_in_one_line(handlers, name):
    task, request, message = HOSTILE[name]
    begun = time.perf_counter()
    with Peak() as peak, pytest.raises(ValueError, match=message) as caught:
        handlers[task](request)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, str(caught.value)
    assert time.perf_counter() - begun < 5 and peak.megabytes < 300
    assert type(caught.value) is ValueError


def test_nothing_says_whether_a_file_exists(handlers, tmp_path):
    """Every character of base64 is one of a path, so that a path can be base64."""
    picture().save(tmp_path / "here.png")
    for names in (("here.png", "gone.png"), ("here", "gone")):
        said = []
        for name in names:
            (tmp_path / "here").write_bytes((tmp_path / "here.png").read_bytes())
            with pytest.raises(ValueError, match="expected") as caught:
                handlers["vqa"](showing(f"{tmp_path}/{name}"))
            said.append(str(caught.value).replace(name, "NAME"))
        assert said[0] == said[1]


def test_a_refusal_leaves_the_model_as_it_was(handlers):
    for task, handler in handlers.items():
        before = handler({"inputs": GOOD[task]})
        for name, (of_task, request, _) in HOSTILE.items():
            if of_task == task and "large" not in name:
                with pytest.raises(ValueError, match=r"."):
                    handler(request)
        assert handler({"inputs": GOOD[task]}) == before
        assert handler.pipeline.model.config.pruning_temperature == pytest.approx(2.0)  # of 0.5


def test_all_parameters_work(handlers):
    options = {
        "num_beams": 2,
        "max_new_tokens": 4,
        "min_new_tokens": 1,
        "repetition_penalty": 1.2,
        "length_penalty": 0.5,
        "no_repeat_ngram_size": 2,
        "early_stopping": True,
    }
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "typical_p": 0.9}
    for request, number in (
        (asking("vqa", top_k=2, max_new_tokens=3, generate_kwargs=options, reduction=0.5), 2),
        (asking("vqa", generate_kwargs=sampling), 1),
        (asking("captioning", max_new_tokens=3, generate_kwargs={**options, "num_return_sequences": 2}), 2),
        (asking("captioning", generate_kwargs={**sampling, "num_return_sequences": 3}), 3),
        (asking("vqa", max_new_tokens=256), 1),  # more than the decoder can write
        (asking("vqa", generate_kwargs={"max_new_tokens": 256, "min_new_tokens": 200}), 1),
        (asking("captioning", generate_kwargs={"max_new_tokens": 256, "min_new_tokens": 200}), 1),
        (asking("nlvr2", top_k=1, reduction=0), 1),
        (asking("retrieval", reduction=0.6), 2),
        (asking("clip", hypothesis_template="a photo of {}", candidate_labels=["one"]), 2),
        (asking("clip", hypothesis_template=endpoint_handler.TEMPLATE), 2),
        ({"inputs": PICTURE, "parameters": {"candidate_labels": ["cat", "dog", "one"], "reduction": 0.4}}, 3),
    ):
        task = "clip" if "image" not in request["inputs"] and "images" not in request["inputs"] else None
        task = task or next(task for task, good in GOOD.items() if request["inputs"] == good)
        assert len(handlers[task](request)) == number, request["parameters"]


def test_a_bad_input_of_a_list_loses_no_other_answer(handlers):
    handler, good = handlers["vqa"], GOOD["vqa"]
    bad = [{"image": "A", "question": "a"}, {"image": PICTURE}, 5, {**good, "image": png(13_000, 13_000)}]
    inputs = [good, bad[0], good, *bad[1:], good]
    answer = handler({"inputs": good})
    answers = handler({"inputs": inputs, "parameters": {"on_error": "skip"}})
    assert [found for found in answers if isinstance(found, list)] == [answer] * 3
    assert [index for index, found in enumerate(answers) if isinstance(found, dict)] == [1, 3, 4, 5]
    for index, message in ((1, "expected base64"), (3, "no question"), (4, "image is 5"), (5, "13000 x 13000")):
        (error,) = answers[index].values()
        assert error.startswith(f"inputs[{index}]: ") and message in error, error
    with pytest.raises(ValueError, match=r"inputs\[3\]: The input has no question"):  # seen before images are read
        handler({"inputs": inputs})
    with pytest.raises(ValueError, match="image is 5"):  # a single input has no others
        handler({"inputs": 5, "parameters": {"on_error": "skip"}})


def test_nothing_is_computed_for_a_list_that_is_refused(handlers, monkeypatch):
    monkeypatch.setattr(handlers["vqa"], "_run", lambda *arguments: pytest.fail("the model was called"))
    with pytest.raises(ValueError, match=r"inputs\[1\]: The input has no question"):
        handlers["vqa"]({"inputs": [GOOD["vqa"], {"image": PICTURE}]})


def test_limits_are_read_from_the_environment(handlers, monkeypatch):
    for name, value in (("MAX_PIXELS", 100), ("FETCH_SECONDS", "0.5"), ("FETCH_URLS", 1)):
        monkeypatch.setenv(f"MADTP_{name}", str(value))
    limits = Limits.from_environment()
    assert (limits.max_pixels, limits.fetch_seconds, limits.fetch_urls) == (100, 0.5, 1)
    assert limits.max_texts == Limits().max_texts
    for value in ("many", "-1", "inf", ""):
        monkeypatch.setenv("MADTP_MAX_TEXTS", value)
        with pytest.raises(ValueError, match=f"variable MADTP_MAX_TEXTS is '{value}': expected a number, such as 256"):
            Limits.from_environment()


def test_limits_hold_at_their_edge():
    assert Limits(max_depth=2).check_size({"inputs": ["a"]}) is None
    with pytest.raises(ValueError, match="depth of more than 2"):
        Limits(max_depth=2).check_size({"inputs": [["a"]]})
    assert Limits(max_texts=2, max_text_length=3).check_texts("text", ["abc", "d"]) == ["abc", "d"]
    with pytest.raises(ValueError, match=r"text\[1\] has 4 characters: expected at most 3"):
        Limits(max_texts=2, max_text_length=3).check_texts("text", ["abc", "abcd"])


# URLs

REFUSED = (
    "127.0.0.1 127.8.8.8 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 240.0.0.1"
    " 255.255.255.255 192.0.2.1 198.18.0.1 :: ::1 fe80::1 fe80::1%lo fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8"
    " ::127.0.0.1 2001:db8::1 2002:7f00:1::1 2001:0:7f00:1::1 64:ff9b::7f00:1 fec0::1"
)


@pytest.mark.parametrize("address", REFUSED.split())
def test_an_address_that_is_not_public_is_refused(address, monkeypatch):
    assert not is_public(address)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    found = [(2, 1, 6, "", (one, 80)) for one in ("8.8.8.8", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ValueError, match=r"'rebound.example' has no public address"):
        fetch("http://rebound.example/image.png", Limits())


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "2001:4860:4860::8888"])
def test_a_public_address_is_accepted(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/", "http://127.0.0.1:8000/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://0/",
        "http://2130706433/", "http://0x7f.1/", "http://127.1/", "http://[::ffff:7f00:1]/", "http://169.254.169.254/latest",
    ],
)  # fmt: skip
def test_forms_of_a_private_address_are_refused(url, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(ValueError, match="has no public address"):
        fetch(url, Limits())


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x",
        "http://user:secret@8.8.8.8/",
        "http://8.8.8.8:x/",
        "http://[8.8.8.8/",
        "http://8.8.8.8:99999/",
    ],
)
def test_what_is_no_url_is_refused(url, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(ValueError, match="can't be fetched") as caught:
        fetch(url, Limits())
    assert "\n" not in str(caught.value)


class Pages(http.server.BaseHTTPRequestHandler):
    """A server whose pages are what hostile servers do."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        page, _, rest = self.path[1:].partition("?")
        self.server.seen.append(self.path)
        try:
            if page == "image":
                self.send(200, base64.b64decode(PICTURE), **({"Connection": "close"} if rest == "last" else {}))
            elif page == "to":
                self.send(302, Location=rest)
            elif page == "round":
                self.send(302, Location="/round")
            elif page == "gone":
                self.send(404, b"gone")
            elif page == "large":
                self.send(200, Content_Length=300_000_000)
            elif page == "endless":
                self.send(200, Content_Length=None, Connection="close")
                while True:
                    self.wfile.write(bytes(65536))
            else:
                drip = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nX-Long: "
                self.wfile.write(drip if page == "headers" else drip[: drip.index(b"X-")] + b"\r\n")
                while True:
                    self.wfile.write(b"a")
                    time.sleep(0.05)
        except OSError:  # the client has gone
            pass


@pytest.fixture
def server(monkeypatch):
    """A server on 127.0.0.1, which counts as public, as no other address does."""
    monkeypatch.setattr(endpoint_handler, "is_public", lambda address: address == "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        server.daemon_threads, server.seen = True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def test_an_image_is_fetched_if_the_operator_says_so(server, handlers, monkeypatch):
    handler = handlers["vqa"]
    answer = handler({"inputs": GOOD["vqa"]})
    monkeypatch.setattr(handler, "limits", Limits(fetch_urls=1))
    monkeypatch.setattr(handler, "parts", endpoint_handler.input_checks(handler.task, handler.limits))
    for path in ("/image", f"/to?{server.url}/image", "/to?/image?last", "/image?ä ö#part"):
        assert handler(showing(server.url + path)) == answer
    seen = ["/image", f"/to?{server.url}/image", "/image", "/to?/image?last", "/image?last", "/image?%C3%A4%20%C3%B6"]
    assert server.seen == seen
    with pytest.raises(ValueError, match=r"gone' can't be fetched .the server answers 404.: expected base64"):
        handler(showing(f"{server.url}/gone"))


@pytest.mark.parametrize(
    "page, message",
    [
        ("to?http://127.0.0.2:{port}/image", "'127.0.0.2' has no public address"),
        ("to?http://localhost.localdomain:{port}/image", "has no public address"),
        ("to?http://[::1]:{port}/image", "'::1' has no public address"),
        ("to?file:///etc/hostname", "is not an http.s. URL of a server"),
        ("to?ftp://127.0.0.1/x", "is not an http.s. URL of a server"),
        ("round", "redirects more than 5 times"),
        ("gone", "the server answers 404"),
        ("large", "the image has 300,000,000 bytes: expected at most 10,000,000"),
        ("endless", "the image has at least 10,0.*bytes: expected at most 10,000,000"),
    ],
)
def test_what_a_server_may_not_do(server, page, message):
    begun = time.perf_counter()
    with Peak() as peak, pytest.raises(ValueError, match=message):
        fetch(f"{server.url}/{page.format(port=server.server_port)}", Limits())
    assert time.perf_counter() - begun < 5 and peak.megabytes < 300
    assert not page.startswith("to?") or server.seen == [f"/{page.format(port=server.server_port)}"]


@pytest.mark.parametrize("page", ["headers", "body"])
def test_a_byte_now_and_then_does_not_hold_the_endpoint(server, page):
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"it takes more than 0.4 seconds"):
        fetch(f"{server.url}/{page}", Limits(fetch_seconds=0.4))
    assert time.perf_counter() - begun < 2


def test_a_handshake_that_never_ends_does_not_hold_the_endpoint(monkeypatch):
    monkeypatch.setattr(endpoint_handler, "is_public", lambda address: address == "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.perf_counter()
        with pytest.raises(ValueError, match=r"it takes more than 0.3 seconds"):
            fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/", Limits(fetch_seconds=0.3))
        assert time.perf_counter() - begun < 2


def test_a_name_that_is_resolved_slowly_does_not_hold_the_endpoint(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1) or [])
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="can't be fetched"):
        fetch("http://slow.example/", Limits(fetch_seconds=0.2))
    assert time.perf_counter() - begun < 0.8


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(monkeypatch):
    """A name server may answer with a public address first and a private one when it is asked again."""
    answers, connected = iter(["93.184.216.34", "127.0.0.1"]), []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(2, 1, 6, "", (next(answers), port))])

    def refuse(address, timeout, **_):
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(ValueError, match=r"'rebound.example' doesn't accept the connection"):
        fetch("http://rebound.example/", Limits())
    assert connected == [("93.184.216.34", 80)] and next(answers) == "127.0.0.1"


# Under fire


def good_requests() -> list[tuple[str, dict]]:
    """Requests of every task at several reductions, whose answers don't depend on chance."""
    found = []
    for task, inputs in GOOD.items():
        for reduction in (None, 0, 0.4, 0.5, 0.6):
            parameters = {} if reduction is None else {"reduction": reduction}
            parameters |= {"max_new_tokens": 3} if task in ("vqa", "captioning") else {}
            found.append((task, {"inputs": inputs, "parameters": parameters}))
            found.append((task, {"inputs": [inputs, inputs], "parameters": parameters}))
    found += [("vqa", asking(top_k=3, reduction=0.6)), ("captioning", asking("captioning", max_new_tokens=5))]
    return found


@pytest.mark.parametrize("number", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_good_requests_among_hostile_ones(handlers, number):
    good, hostile, draw = good_requests(), list(HOSTILE.values()), random.Random(0)
    alone = [json.dumps(handlers[task](request)) for task, request in good]
    kinds = ["hostile" if index % 10 == 5 else "good" for index in range(number)]
    jobs = [(kind, draw.randrange(len(good if kind == "good" else hostile))) for kind in kinds]

    def send(job) -> tuple[bool, float]:
        kind, index = job
        task, request = (good if kind == "good" else hostile)[index][:2]
        begun = time.perf_counter()
        try:
            answer = json.dumps(handlers[task](request))
            is_right = kind == "good" and answer == alone[index]
        except ValueError as error:
            is_right = kind == "hostile" and "\n" not in str(error)
        return is_right, time.perf_counter() - begun

    with Peak() as peak, ThreadPoolExecutor(8) as threads:
        results = list(threads.map(send, jobs))
    wrong = [job for job, (is_right, _) in zip(jobs, results) if not is_right]
    times = [(kind, seconds) for (kind, _), (_, seconds) in zip(jobs, results)]
    slowest = {kind: max(seconds for of, seconds in times if of == kind) for kind in ("good", "hostile")}
    print(f"\n{number} requests, {len(wrong)} wrong; slowest {slowest}; {peak.megabytes:.0f} MB")
    assert not wrong
    assert slowest["hostile"] < 5 and peak.megabytes < 300
