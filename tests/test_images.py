import io

import numpy as np
import pytest
from PIL import Image

from madtp_hf.modeling.images import open_image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_from_a_path_bytes_and_an_open_image(tmp_path):
    image = Image.new("RGB", (5, 3), (10, 20, 30))
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image), image):
        opened = open_image(source)
        assert (opened.mode, opened.size, opened.getpixel((0, 0))) == ("RGB", (5, 3), (10, 20, 30))


def test_exif_orientation_turns_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image = Image.new("RGB", (6, 3), "black")
    image.paste("white", (0, 0, 3, 3))
    opened = open_image(encoded(image, exif=exif))
    assert opened.size == (3, 6)
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((0, 5)) == (0, 0, 0)


def test_broken_exif_data_leaves_the_image_as_it_is():
    assert open_image(encoded(Image.new("RGB", (6, 3)), exif=b"Exif\0\0not EXIF")).size == (6, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    values = np.array([[0, 128 * 257, 65535]], np.uint16)
    opened = open_image(encoded(Image.fromarray(values), kind))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


def test_floats_up_to_one_are_scaled():
    assert open_image(encoded(Image.new("F", (1, 1), 1.0), "TIFF")).getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_become_rgb():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert open_image(encoded(red.convert("P"))).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(encoded(red.convert("CMYK"), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(encoded(red.convert("L"))).mode == "RGB"
    assert open_image(encoded(red.convert("1"))).mode == "RGB"


def test_transparent_pixels_are_white():
    assert open_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("LA", (2, 2), (0, 255)))).getpixel((0, 0)) == (0, 0, 0)
    palette = Image.new("P", (2, 2))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert open_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    opened = open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert opened.getpixel((0, 0)) == (255, 0, 0)


def test_what_cannot_be_read_is_a_short_value_error(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    (tmp_path / "empty.png").touch()
    for source, reason in (
        (b"", "empty"),
        (tmp_path / "empty.png", "empty"),
        (b"no image at all", "not an image"),
        (encoded(noise)[:2000], "."),
        (encoded(noise, "JPEG")[:1000], "truncated"),
        (tmp_path / "missing.png", "no such file"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            open_image(source)
        assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    with pytest.raises(TypeError, match="int"):
        open_image(3)
