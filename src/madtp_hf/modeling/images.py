"""Decode images of any format that Pillow reads to upright 8-bit RGB."""

import os
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


MAX_PIXELS = Image.MAX_IMAGE_PIXELS


class UnreadableImage(ValueError):
    """Raised for an image that can't be read; the message is only the reason, short and without the path."""


def open_image(source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as 8-bit RGB, turned upright by its EXIF orientation.

    An animation gives its first frame. 16-bit images are scaled to 8 bits, transparent pixels are shown on white.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`):
            A path, the content of an image file, or an open image.
        max_pixels (`int`, *optional*): The largest image to decode; a larger one may be a decompression bomb.

    Returns:
        `PIL.Image.Image` in mode `"RGB"`, which holds no file open.

    Raises:
        UnreadableImage: a `ValueError`, if the image can't be read for any reason.
        TypeError: for a source of another type.
    """
    if isinstance(source, Image.Image):
        return _decode(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise UnreadableImage("an empty file")
        return _open(BytesIO(source), max_pixels)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"The image is a {type(source).__name__}: expected a path, bytes or a PIL image.")
    _check_file(source)
    try:
        with open(source, "rb") as file:
            return _open(file, max_pixels)
    except OSError as error:
        raise UnreadableImage((error.strerror or str(error)).lower()) from error


def _check_file(path) -> None:
    """Raise an `UnreadableImage` where its reason is clearer than the operating system's."""
    if not os.path.exists(path):
        raise UnreadableImage("a link to nowhere" if os.path.islink(path) else "no such file or directory")
    if os.path.isdir(path):
        raise UnreadableImage("a folder")
    if not os.path.isfile(path):
        raise UnreadableImage("not a regular file")
    if os.path.getsize(path) == 0:
        raise UnreadableImage("an empty file")


def _open(file, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, and about sizes, which _decode checks
            with Image.open(file) as image:
                return _decode(image, max_pixels)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image, or of an unknown format") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"more pixels than --max_pixels {max_pixels}") from error
    except Exception as error:  # broken files make Pillow's plugins raise nearly anything
        raise UnreadableImage(_reason(error)) from error


def _decode(image: Image.Image, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than --max_pixels {max_pixels}")
    try:
        image.load()  # an animation loads its current frame, the first
        return _to_rgb(_upright(image))
    except Exception as error:
        raise UnreadableImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy of the image, turned by its EXIF orientation."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF data is damaged, the pixels are good
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB; Pillow's own conversion clips 16-bit levels at 255 and reveals transparent pixels."""
    if image.mode.startswith(("I", "F")):
        levels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # Levels are 16-bit, 8-bit in a wider mode, or floats from 0 to 1.
        top = 65535 if image.mode.startswith("I;16") or levels.max() > 255 else 255
        if image.mode == "F" and levels.max() <= 1:
            top = 1
        return Image.fromarray((levels / top * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
