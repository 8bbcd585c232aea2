"""Odd images, through every road by which an image enters: all see the same pixels."""

import base64
import io
import pickle
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from madtp_hf.data import CaptioningCollator
from madtp_hf.data.rows import Row
from madtp_hf.jobs import Reader
from madtp_hf.modeling import pipeline_madtp_blip as pipelines
from madtp_hf.modeling.images import UnreadableImage, read_image
from madtp_hf.search import embedding
from madtp_hf.serving.onnx_runner import OnnxModel
from madtp_hf.serving.visualization import preprocess

from .conftest import make_processor, make_task_model


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GRAY = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)  # height 6, width 8
COLOUR = np.stack([GRAY, GRAY[::-1], 255 - GRAY], axis=-1)
RGB = Image.fromarray(COLOUR)
CLEAR = np.where(np.arange(8) < 3, 0, 255).astype(np.uint8)[None].repeat(6, 0)  # transparent on the left
ON_WHITE = np.where(CLEAR[..., None] == 0, 255, COLOUR)
GRAY_ON_WHITE = np.where(CLEAR == 0, 255, GRAY)
DEEP = GRAY.astype(np.uint16) * 257
FRAMES = [Image.new("RGB", (8, 6), colour) for colour in ("blue", "lime")]
PALETTE = RGB.quantize(48, dither=Image.Dither.NONE)


def turned(orientation: int, kind="PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, kind, exif=exif)


# What turns the stored pixels upright, by EXIF orientation.
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def png(kind: int, depth: int, rows: bytes, *chunks: bytes, interlace=0, size=(8, 6)) -> bytes:
    """A PNG by hand, of a kind that Pillow doesn't write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, interlace))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunk(content[:4], content[4:]) for content in chunks)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def lines(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def interlaced() -> bytes:
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    parts = [COLOUR[top::down, left::right] for top, down, left, right in passes]
    return png(2, 8, b"".join(lines(part) for part in parts if part.size), interlace=1)


def first_page_of_a_tiff() -> bytes:
    return encoded(RGB, "TIFF", save_all=True, append_images=FRAMES)


def animated(kind: str, **options) -> bytes:
    return encoded(RGB, kind, save_all=True, append_images=FRAMES, duration=50, **options)


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6
BIG_ENDIAN = Image.frombytes("I;16B", (8, 6), DEEP.astype(">u2").tobytes())
RGBA = np.dstack([COLOUR, CLEAR])
FIRST = np.asarray(RGB.quantize(256).convert("RGB"))  # a GIF has a palette
# By name: the file's content and its pixels, gray (6, 8) or colour (6, 8, 3).
ODD = {
    "gray": (encoded(Image.fromarray(GRAY)), GRAY),
    "1-bit": (encoded(Image.fromarray(GRAY > 100)), np.where(GRAY > 100, 255, 0)),
    "2-bit gray": (png(0, 2, lines(np.full((6, 2), 0b00011011, np.uint8))), np.tile([0, 85, 170, 255], (6, 2))),
    "16-bit gray PNG": (encoded(Image.fromarray(DEEP)), GRAY),
    "16-bit gray TIFF": (encoded(Image.fromarray(DEEP), "TIFF"), GRAY),
    "16-bit gray TIFF, big-endian": (encoded(BIG_ENDIAN, "TIFF"), GRAY),
    "16-bit gray, dark": (encoded(Image.fromarray(DEEP // 300)), np.round(DEEP // 300 / 257)),
    "16-bit gray PGM": (b"P5 8 6 65535\n" + DEEP.astype(">u2").tobytes(), GRAY),
    "16-bit gray PGM, dark": (b"P5 8 6 65535\n" + (DEEP // 300).astype(">u2").tobytes(), np.round(DEEP // 300 / 257)),
    "16-bit gray, one level transparent": (
        png(0, 16, lines(DEEP.astype(">u2")), b"tRNS" + struct.pack(">H", int(DEEP[2, 3]))),
        np.where(DEEP == DEEP[2, 3], 255, GRAY),
    ),
    "16-bit RGB": (png(2, 16, lines((COLOUR.astype(np.uint16) * 257).astype(">u2"))), COLOUR),
    "16-bit RGBA": (png(6, 16, lines((RGBA.astype(np.uint16) * 257).astype(">u2"))), ON_WHITE),
    "16-bit gray with alpha": (
        png(4, 16, lines(np.dstack([DEEP, CLEAR.astype(np.uint16) * 257]).astype(">u2"))),
        GRAY_ON_WHITE,
    ),
    "32-bit integers of 16 bits": (encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), GRAY),
    "32-bit integers of 8 bits": (encoded(Image.fromarray(GRAY.astype(np.int32)), "TIFF"), GRAY),
    "floats to 1": (encoded(Image.fromarray(GRAY.astype(np.float32) / 255), "TIFF"), GRAY),
    "floats to 255": (encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), GRAY),
    "floats, one not a number": (
        encoded(Image.fromarray(np.where(GRAY == 0, np.nan, GRAY / np.float32(255)).astype(np.float32)), "TIFF"),
        GRAY,
    ),
    "gray with alpha": (encoded(Image.fromarray(np.dstack([GRAY, CLEAR]), "LA")), GRAY_ON_WHITE),
    "RGBA": (encoded(Image.fromarray(RGBA)), ON_WHITE),
    "RGBA TIFF": (encoded(Image.fromarray(RGBA), "TIFF"), ON_WHITE),
    "RGBA WebP": (encoded(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), ON_WHITE),
    "RGB, one colour transparent": (
        encoded(RGB, transparency=tuple(COLOUR[1, 1].tolist())),
        np.where((COLOUR == COLOUR[1, 1]).all(-1, keepdims=True), 255, COLOUR),
    ),
    "gray, one level transparent": (
        encoded(Image.fromarray(GRAY), transparency=int(GRAY[1, 1])),
        np.where(GRAY == GRAY[1, 1], 255, GRAY),
    ),
    "palette": (encoded(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "palette, one colour transparent": (
        encoded(PALETTE, transparency=int(np.asarray(PALETTE)[0, 0])),
        np.where((np.asarray(PALETTE) == np.asarray(PALETTE)[0, 0])[..., None], 255, PALETTE.convert("RGB")),
    ),
    "palette with an alpha a colour": (
        encoded(PALETTE, transparency=bytes([0] * 10 + [255] * 38)),
        np.where((np.asarray(PALETTE) < 10)[..., None], 255, PALETTE.convert("RGB")),
    ),
    "CMYK TIFF": (encoded(RGB.convert("CMYK"), "TIFF"), COLOUR),
    "CMYK JPEG": (encoded(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "JPEG"), [[[255, 0, 0]]]),
    "gray JPEG": (encoded(Image.new("L", (8, 6), 77), "JPEG"), [[[77] * 3]]),
    "progressive JPEG": (encoded(Image.new("L", (8, 6), 99), "JPEG", progressive=True), [[[99] * 3]]),
    "BMP": (encoded(RGB, "BMP"), COLOUR),
    "interlaced PNG": (interlaced(), COLOUR),
    "animated GIF": (animated("GIF"), np.asarray(Image.open(io.BytesIO(animated("GIF"))).convert("RGB"))),
    "transparent GIF": (
        encoded(PALETTE, "GIF", transparency=int(np.asarray(PALETTE)[0, 0])),
        np.where((np.asarray(PALETTE) == np.asarray(PALETTE)[0, 0])[..., None], 255, PALETTE.convert("RGB")),
    ),
    "animated WebP": (animated("WEBP", lossless=True), COLOUR),
    "animated PNG": (animated("PNG"), COLOUR),
    "animated PNG with another still": (
        encoded(RGB, save_all=True, append_images=FRAMES, default_image=True),
        COLOUR,
    ),
    "TIFF of three pages": (first_page_of_a_tiff(), COLOUR),
    "broken EXIF": (encoded(RGB, exif=b"Exif\0\0not EXIF"), COLOUR),
    "one pixel": (encoded(Image.new("RGB", (1, 1), (7, 8, 9))), [[[7, 8, 9]]]),
    "one row": (encoded(RGB.crop((0, 0, 8, 1))), COLOUR[:1]),
    "one column": (encoded(RGB.crop((0, 0, 1, 6))), COLOUR[:, :1]),
    "three rows": (encoded(RGB.crop((0, 0, 8, 3))), COLOUR[:3]),
    "three columns": (encoded(RGB.crop((0, 0, 3, 6))), COLOUR[:, :3]),
    "16 bits, on its side": (
        # Compressed, since Pillow itself garbles what it maps into memory and rotates.
        encoded(Image.fromarray(DEEP), "TIFF", tiffinfo={0x0112: 6}, compression="tiff_deflate"),
        np.rot90(GRAY, -1),
    ),
    **{f"EXIF orientation {number}": (turned(number), turn(COLOUR)) for number, turn in UPRIGHT.items()},
    "EXIF orientation of a WebP": (
        encoded(RGB, "WEBP", lossless=True, exif=ORIENTED.tobytes()),
        np.rot90(COLOUR, -1),
    ),
}  # fmt: skip


def expected_of(name: str) -> np.ndarray:
    pixels = np.asarray(ODD[name][1])
    pixels = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1)
    if pixels.shape[:2] == (1, 1) and name != "one pixel":
        pixels = np.broadcast_to(pixels, (6, 8, 3))
    return pixels.astype(np.uint8)


@pytest.fixture(scope="module")
def roads():
    """Functions of (content of a file, path of the same file) -> pixel values, one a road."""
    processor, model = make_processor(), make_task_model("vqa")
    pipe = model.as_pipeline(processor, max_new_tokens=2)
    collate = CaptioningCollator(processor, 38)
    runner = SimpleNamespace(processor=processor)
    image_processor = processor.image_processor

    def of_pipeline(image):
        return pipe.preprocess({"image": image, "question": "which digit?"})["pixel_values"][0]

    def of_collator(image):
        return collate([{"image": image, "captions": "a seven"}])["pixel_values"][0]

    def of_job(image):
        source = SimpleNamespace(rows=lambda start, stop: [Row(0, "a", {"image": image})])
        return normalised(Reader(source, image_processor)[[0]])

    def normalised(batch):
        assert not batch.errors
        mean, std = (
            np.reshape(values, (3, 1, 1)) for values in (image_processor.image_mean, image_processor.image_std)
        )
        return (batch.pixels[0] / 255 - mean) / std

    def text(content):
        return base64.b64encode(content).decode()

    return {
        "pipeline, path": lambda content, path: of_pipeline(path),
        "pipeline, string": lambda content, path: of_pipeline(str(path)),
        "pipeline, opened": lambda content, path: of_pipeline(Image.open(path)),
        "pipeline, base64": lambda content, path: of_pipeline(text(content)),
        "pipeline, data URL": lambda content, path: of_pipeline(f"data:image/png;base64,{text(content)}"),
        "collator, path": lambda content, path: of_collator(path),
        "collator, undecoded": lambda content, path: of_collator({"bytes": content, "path": None}),
        "collator, datasets": lambda content, path: of_collator(decoded_by_datasets(content)),
        "job, path": lambda content, path: of_job(str(path)),
        "job, bytes": lambda content, path: of_job(content),
        "embedding": lambda content, path: normalised(Reader(embedding._Given([path]), image_processor)[[0]]),
        "ONNX": lambda content, path: OnnxModel.read_images(runner, [path])[0],
        "visualization": lambda content, path: preprocess(model, processor, [path], ["a"])[0]["pixel_values"][0],
    }


def decoded_by_datasets(content: bytes) -> Image.Image:
    return pytest.importorskip("datasets").Image().decode_example({"bytes": content, "path": None})


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_gives_the_same_pixels_on_every_road(name, roads, tmp_path):
    content, expected = ODD[name][0], expected_of(name)
    (tmp_path / "image.png").write_bytes(content)  # a wrong suffix changes nothing
    sources = (content, bytearray(content), tmp_path / "image.png", str(tmp_path / "image.png"), io.BytesIO(content))
    for source in (*sources, Image.open(tmp_path / "image.png"), {"bytes": content}, expected.copy()):
        image = read_image(source)
        assert image.mode == "RGB" and np.array_equal(image, expected)
    processed = make_processor().image_processor(
        images=Image.fromarray(expected), input_data_format="channels_last", return_tensors="pt"
    )
    for road, read in roads.items():
        if name == "broken EXIF" and road == "collator, datasets":
            continue  # `datasets` itself can't decode it
        pixels = torch.as_tensor(read(content, tmp_path / "image.png")).float()
        assert torch.allclose(pixels, processed.pixel_values[0], atol=1e-5, rtol=0), road


def test_a_url_is_fetched_and_decoded_alike(monkeypatch):
    response = SimpleNamespace(content=ODD["16-bit gray PNG"][0])
    response.raise_for_status = lambda: response
    calls = []
    monkeypatch.setattr(pipelines.httpx, "get", lambda *args, **options: calls.append((args, options)) or response)
    image = pipelines._load_image("https://images.example/deep.png", 5.0)
    assert np.array_equal(image, expected_of("16-bit gray PNG"))
    assert calls == [(("https://images.example/deep.png",), {"timeout": 5.0, "follow_redirects": True})]
    response.content = b"<html>"
    with pytest.raises(UnreadableImage, match=r"'https://images.example/deep.png' can't be read: not an image"):
        pipelines._load_image("https://images.example/deep.png")
    with pytest.raises(UnreadableImage, match="no such file or directory"):  # only pipelines fetch
        read_image("https://images.example/deep.png")


def test_an_unreadable_image_is_named_and_the_reason_is_short(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    (tmp_path / "empty.png").touch()
    (tmp_path / "link.png").symlink_to("nowhere")
    (tmp_path / "cut.png").write_bytes(encoded(noise)[:2000])
    for source, name, reason in (
        (b"", "of 0 bytes", "an empty file"),
        (tmp_path / "empty.png", "empty.png", "an empty file"),
        (b"no image at all", "of 15 bytes", "not an image"),
        (tmp_path / "cut.png", "cut.png", "."),
        (encoded(noise, "JPEG")[:1000], "of 1000 bytes", "truncated"),
        (tmp_path / "missing.png", "missing.png", "no such file"),
        (str(tmp_path / "link.png"), "link.png", "a broken symlink"),
        (tmp_path, tmp_path.name, "it is a directory"),
        (np.zeros((3, 4, 4), np.uint8), r"shape \(3, 4, 4\)", r"expected \(height, width, 3\)"),
        (np.zeros((4, 4, 3)), "float64", "uint8"),
    ):
        with pytest.raises(UnreadableImage, match=f"{name}.* can't be read: .*{reason}") as caught:
            read_image(source)
        message, error = str(caught.value), pickle.loads(pickle.dumps(caught.value))
        assert isinstance(caught.value, ValueError) and "\n" not in message and "--" not in message
        assert (str(error), error.reason) == (message, caught.value.reason) and str(tmp_path) not in error.reason
    for source in (3, None, [b""]):
        with pytest.raises(TypeError, match=type(source).__name__):
            read_image(source)


def test_the_limit_of_pixels_is_the_callers_and_pillows_stays(monkeypatch):
    with pytest.raises(UnreadableImage, match="8 x 6 pixels, more than the limit of 47"):
        read_image(encoded(RGB), max_pixels=47)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # as if the image were huge
    assert read_image(encoded(RGB), max_pixels=48).size == (8, 6) and Image.MAX_IMAGE_PIXELS == 10
    huge = encoded(Image.new("1", (20000, 10000)))
    with pytest.raises(UnreadableImage, match="20000 x 10000 pixels, more than the limit of 89478485"):
        read_image(huge)
