"""Image files of any mode to pixels [channels, height, width]."""

import struct
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from shared.errors import UserError

Mode = Literal["L", "RGB"]
_GREY = ("1", "L", "LA", "La")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error)


def read_image(file: Path, mode: Mode | None = None, size: int | None = None) -> Tensor:
    """An image as it is looked at: turned as its EXIF says, transparency on white, of an animation
    the first frame.

    Args:
        mode: "L" for grey, "RGB" for three channels; None keeps a grey image grey and makes any
            other RGB.
        size: see `square`; None keeps the size of the file.

    Returns:
        [channels, height, width], uint8, or float32 from 0 to 1 for grey of 16 bits, which 8 do
        not hold.

    Raises:
        UserError: no image, a damaged or truncated one, or one whose numbers have no known range.
    """
    try:
        with Image.open(file) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            image = _deep(image) if image.mode.startswith(("I", "F")) else _plain(image)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()).replace(f" {str(file)!r}", "")
        raise UserError(f"{file} is no image that can be read: {reason}") from None
    if image.mode == "F":
        pixels = to_pixels(image if size is None else square(image, size)).clamp(0, 1)
        return pixels.expand(3, -1, -1).clone() if mode == "RGB" else pixels
    image = image if mode is None else image.convert(mode)
    return to_pixels(image if size is None else square(image, size))


def _plain(image: Image.Image) -> Image.Image:
    """8 bits a channel, "L" or "RGB"."""
    grey = image.mode in _GREY
    if image.mode in _ALPHA or "transparency" in image.info:
        image = Image.fromarray(on_white(np.asarray(image.convert("RGBA"))))
    return image.convert("L" if grey else "RGB")


def _deep(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as "F" from 0 to 1. Pillow's own conversion to 8 bits cuts at 255."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its numbers are not of 8 or 16 bits; scale them to 0..65535 first")
    return Image.fromarray((values / 65535).astype(np.float32))


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images uint8 [..., 4] with an alpha channel, laid on white: uint8 [..., 3]."""
    alpha = rgba[..., 3:] / 255.0
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def square(image: Image.Image, size: int) -> Image.Image:
    """The shorter edge brought to `size` pixels (bicubic), then the middle: torchvision's Resize
    and CenterCrop. An image of that size is left as it is.
    """
    if image.size == (size, size):
        return image
    width, height = (size * edge // min(image.size) for edge in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop(
        (left, top, left + size, top + size)
    )


def to_pixels(image: Image.Image) -> Tensor:
    """A PIL image of mode L, RGB (uint8) or F (float32): [channels, height, width]."""
    values = torch.from_numpy(np.array(image))
    return values.unsqueeze(0) if values.dim() == 2 else values.permute(2, 0, 1).contiguous()


def to_picture(pixels: Tensor) -> Image.Image:
    """The PIL image of pixels uint8 [channels, height, width] (RGB or grey), or of float32 grey
    ones: `to_pixels` back.
    """
    values = pixels.movedim(0, -1).numpy()
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if len(pixels) == 1 else values))
