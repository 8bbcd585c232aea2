"""Image files of any kind as upright RGB images, or the reason why not."""

import os
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


MAX_PIXELS = Image.MAX_IMAGE_PIXELS


class UnreadableImage(ValueError):
    """An image that can't be read; its message is the reason, without the image's name."""


def read_rgb(image: str | bytes | None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as RGB, upright by its EXIF orientation.

    Of an animation the first frame is read; transparent parts become white; 16-bit levels are scaled to 8 bits.

    Args:
        image (`str` or `bytes`): the path, or the content, of an image file.
        max_pixels (`int`): the largest image to decode. Larger ones, such as decompression bombs, are not opened.

    Raises: `UnreadableImage`, whatever goes wrong.
    """
    if image is None or image == b"":
        raise UnreadableImage("there is no image in this row")
    if isinstance(image, str):
        _check_file(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes, which are checked below
            with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
                width, height = opened.size
                if width * height > max_pixels:
                    raise UnreadableImage(f"{width} x {height} pixels, more than --max_pixels {max_pixels}")
                opened.load()
                return _to_rgb(_upright(opened))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more pixels than --max_pixels {max_pixels}") from None
    except Exception as error:  # decoders raise whatever their format's code does: SyntaxError, struct.error, ...
        text = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(text[:200]) from None


def _check_file(path: str) -> None:
    if not os.path.exists(path):
        raise UnreadableImage("a link to nowhere" if os.path.islink(path) else "no such file")
    if os.path.isdir(path):
        raise UnreadableImage("a folder")
    if not os.path.isfile(path):
        raise UnreadableImage("not a regular file")
    if os.path.getsize(path) == 0:
        raise UnreadableImage("an empty file")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata cost the orientation, not the image
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """As RGB; Pillow's own conversion cuts 16-bit levels off at 255 and shows what transparency hides."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        largest = levels.max()
        # Of 16 bits, or of 8 bits in a wider mode, or floats from 0 to 1.
        scale = 255 / 65535 if largest > 255 else 255 if image.mode == "F" and largest <= 1 else 1
        return Image.fromarray((levels * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
