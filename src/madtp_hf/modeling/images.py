"""Decode images of any format that Pillow reads to upright 8-bit RGB: the only decoder, for training and inference."""

import os
import threading
import warnings
from contextlib import suppress
from io import BytesIO

import numpy as np


# Only reading images needs Pillow. transformers loads a checkpoint's files only if all of their imports are installed,
# except those in a `try`.
try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise ImportError("Reading images needs Pillow: pip install pillow.") from error


MAX_PIXELS: int = Image.MAX_IMAGE_PIXELS or 2**30 // 12  # Pillow's own, unless that is switched off
_LOCK = threading.Lock()  # Pillow's size limit and the warnings are the process's, not a thread's


class UnreadableImage(ValueError):
    """Raised for an image that can't be read. `reason` is the message without the image's name."""

    def __init__(self, reason: str, name: str = "The image"):
        super().__init__(f"{name} can't be read: {reason}.")
        self.reason, self.name = reason, name

    def __reduce__(self):
        return type(self), (self.reason, self.name)


def read_image(source, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Read an image as 8-bit RGB, rotated upright by its EXIF orientation.

    16-bit and floating-point levels are scaled to 8 bits, transparent pixels are shown on white, and an animation or a
    file of several pages gives its first frame.

    Args:
        source (`str`, `os.PathLike`, `bytes`, file, `PIL.Image.Image` or `numpy.ndarray`):
            A path; the content of an image file, or a binary file; an open image; or an array (height, width, 3) of
            uint8. Also `{"bytes": ..., "path": ...}`, as `datasets.Image(decode=False)` gives it.
        max_pixels (`int`, *optional*): The largest image to decode; a larger one may be a decompression bomb.
        formats (`tuple[str, ...]`, *optional*):
            Pillow's names of the formats that a file may have; by default all that Pillow reads.

    Returns:
        `PIL.Image.Image` in mode `"RGB"`, which holds no file open.

    Raises:
        UnreadableImage: a `ValueError` that names the image, if it can't be read for any reason.
        TypeError: for a source of another type.
    """
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    name = _name_of(source)
    try:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
                raise UnreadableImage("expected (height, width, 3) and uint8")
            source = Image.fromarray(source)
        if isinstance(source, Image.Image):
            return _decode(source, max_pixels)
        if isinstance(source, (bytes, bytearray, memoryview)):
            return _open(BytesIO(source), max_pixels, formats)
        if not isinstance(source, (str, os.PathLike)):
            return _open(source, max_pixels, formats)
        if not os.path.isfile(source):
            raise UnreadableImage(_why_no_file(source))
        with open(source, "rb") as file:
            return _open(file, max_pixels, formats)
    except UnreadableImage as error:
        raise UnreadableImage(error.reason, name) from error.__cause__
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image, or of an unknown format", name) from error
    except Exception as error:  # broken files make Pillow's plugins raise nearly anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadableImage(reason.rstrip("."), name) from error


def _name_of(source) -> str:
    """Return what messages call an image; raise a `TypeError` for what can't be one."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"The image of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"The image, an array of shape {source.shape} and dtype {source.dtype},"
    if not isinstance(source, (str, os.PathLike, Image.Image)) and not hasattr(source, "read"):
        raise TypeError(
            f"The image is a {type(source).__name__}: expected a path, the bytes of an image file, a PIL image, or a"
            " uint8 array (height, width, 3)."
        )
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else str(getattr(source, "name", ""))
    text = getattr(source, "filename", text)  # of a PIL image
    return f"The image {text if len(text) <= 200 else text[:200] + '...'}".rstrip()


def _why_no_file(path) -> str:
    if not os.path.exists(path):
        return "a broken symlink" if os.path.islink(path) else "no such file or directory"
    return "it is a directory" if os.path.isdir(path) else "not a regular file"


def _open(file, max_pixels: int, formats: tuple[str, ...] | None) -> Image.Image:
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # _decode has its own
        try:
            image = Image.open(file, formats=formats)  # reads the header
        except UnidentifiedImageError:
            if not (file.seek(0, os.SEEK_END) if file.seekable() else True):
                raise UnreadableImage("an empty file") from None
            raise
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        return _decode(image, max_pixels, in_place=True)


def _decode(image: Image.Image, max_pixels: int, in_place: bool = False) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise UnreadableImage(f"{image.width} x {image.height} pixels, more than the limit of {max_pixels}")
    image.load()  # an animation loads its current frame, the first
    is_16_bit = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    with suppress(Exception):  # the EXIF data may be damaged, the pixels are good
        image = ImageOps.exif_transpose(image, in_place=in_place) or image
    return _to_rgb(image, is_16_bit)


def _to_rgb(image: Image.Image, is_16_bit: bool) -> Image.Image:
    """Convert an image to RGB; Pillow's own conversion clips 16-bit levels at 255 and reveals transparent pixels."""
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image)
        levels = np.where(np.isfinite(levels), levels, 0) if image.mode == "F" else levels
        # Levels are 16-bit, 8-bit in a wider mode, or floats from 0 to 1.
        top = 65535 if is_16_bit or levels.max() > 255 else 255
        if image.mode == "F" and levels.max() <= 1:
            top = 1
        scaled = np.empty(levels.shape, np.uint8)
        for rows, into in zip(np.array_split(levels, 64), np.array_split(scaled, 64)):  # in little memory
            into[:] = (rows.astype(np.float64) / top * 255).round().clip(0, 255)
        if isinstance(clear := image.info.get("transparency"), int):
            scaled[levels == clear] = 255
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("La", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return white.convert("RGB")
    return image.convert("RGB")  # a copy
