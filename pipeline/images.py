"""From image bytes to pixels: a defined conversion for every mode, and the views that both encoders share."""

import hashlib
import io
import math

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What Pillow decodes by itself. Not EPS, which starts Ghostscript, nor ICO and ICNS, whose inner pictures may be larger
# than their headers say, nor the rare formats that nobody looks after.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


class BadImage(Exception):
    """The bytes are not a usable picture; the message is the reason for the dead letter."""


def decode(content: bytes, max_pixels: int) -> Image.Image:
    """Decodes image bytes to RGB: frame 0, EXIF orientation applied, alpha over white, 16 bits scaled to 8.

    Raises: BadImage with the reason, whatever a decoder raises: on damaged bytes that may be any exception. A picture
    above `max_pixels`, or of another format than FORMATS, is refused from its header.
    """
    if not content:
        raise BadImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage(f"not a picture that is read here ({', '.join(FORMATS)})") from None
    except Exception as error:
        raise BadImage(f"not a picture: {_reason(error)}") from None
    if not 0 < image.width * image.height <= max_pixels:
        raise BadImage(f"{image.width} x {image.height} pixels are none or more than max_image_pixels = {max_pixels}")
    try:
        image.seek(0)
        image.load()
        image = ImageOps.exif_transpose(image)
        return _rgb(image)
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    text = str(error).partition("<")[0].strip() or type(error).__name__
    return " ".join(text.split())


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel; Pillow's own convert would clip at 255
        pixels = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(pixels / 257, 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def evaluation_view(image: Image.Image, side: int) -> np.ndarray:
    """View 0: the whole picture resized to `side` x `side` (bicubic, no crop); uint8 [3, side, side].

    Source: LAVIS BlipImageEvalProcessor.
    """
    resized = image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, np.uint8).transpose(2, 0, 1))


CROP = "RandomResizedCrop(scale 0.5-1, ratio 3/4-4/3, bicubic) + flip, philox4x64/sha256(seed,view,id)"


def view(image: Image.Image, side: int, number: int, seed: int, sample_id: str) -> np.ndarray:
    """View 0 is the evaluation view; view v > 0 a random resized crop and flip, a pure function of (seed, v, id).

    Returns uint8 [3, side, side]. Source: LAVIS BlipImageTrainProcessor; the box as torchvision's RandomResizedCrop.
    """
    if number == 0:
        return evaluation_view(image, side)
    digest = hashlib.sha256(f"view/{seed}/{number}/{sample_id}".encode()).digest()
    draw = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], "<u8")))
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    for _ in range(10):
        area = width * height * draw.uniform(0.5, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(0, width - w + 1)), int(draw.integers(0, height - h + 1))
            box = (left, top, left + w, top + h)
            break
    resized = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(resized, np.uint8)
    if draw.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def normalise(pixels: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]) -> np.ndarray:
    """uint8 [B, 3, S, S] -> float32 [B, 3, S, S], scaled to 0..1, minus mean, divided by std."""
    shift = np.array(mean, np.float32)[:, None, None]
    scale = np.array(std, np.float32)[:, None, None]
    return (pixels.astype(np.float32) / 255 - shift) / scale
