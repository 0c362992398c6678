"""Every kind of image has a defined conversion; what cannot be read has a reason."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.images import FORMATS, BadImage, decode, evaluation_view, normalise, view


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_sixteen_bits_keep_their_mean() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    pixels = np.asarray(decode(encoded(Image.fromarray(ramp)), 10**6))
    assert pixels.shape == (64, 64, 3) and abs(pixels.mean() - 127.5) < 1


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif), 10**6).size == (20, 40)


def test_alpha_lies_over_white_and_palettes_and_cmyk_become_rgb() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(decode(encoded(clear), 10**6)).min() == 255
    for mode in ("P", "L", "CMYK", "1", "LA"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert decode(encoded(Image.new(mode, (4, 4)), kind), 10**6).mode == "RGB"


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(np.asarray(decode(content, 10**6))[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("content", [b"", b"hello", encoded(Image.new("RGB", (64, 64)), "JPEG")[:200]])
def test_broken_files_have_a_reason(content: bytes) -> None:
    with pytest.raises(BadImage, match=r"\w+"):
        decode(content, 10**6)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about the damage
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_pictures_of_every_format_are_pictures_or_bad_ones_and_raise_nothing_else(kind: str) -> None:
    draw = random.Random(kind)
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3)).astype(np.uint8)
    whole, refused = encoded(Image.fromarray(noise), kind), 0
    assert decode(whole, 10**6).size == (32, 24)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 4, 16])):
            content[draw.randrange(min(len(content), draw.choice([64, 400, 10**6])))] = draw.randrange(256)
        try:
            picture = decode(bytes(content[: draw.choice([len(content), draw.randrange(1, len(content))])]), 10**6)
        except BadImage as error:
            refused += bool(str(error))
        else:
            assert view(picture, 16, 1, 0, "x").shape == (3, 16, 16)
    assert refused > 20


@pytest.mark.parametrize("kind", ["ICO", "EPS", "ICNS", "TGA", "DDS", "SPIDER"])
def test_formats_that_start_programs_hide_pictures_or_are_rare_are_not_read(kind: str) -> None:
    mode = "F" if kind == "SPIDER" else "RGB"
    with pytest.raises(BadImage, match="not a picture that is read here"):
        decode(encoded(Image.new(mode, (32, 32)), kind), 10**6)


def test_a_decoder_that_runs_into_the_unexpected_is_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("Failed to decode image"), NotImplementedError(), AttributeError("x"), MemoryError()):
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(BadImage, match="cannot be decoded: (Failed|[A-Z]|x)"):
            decode(encoded(Image.new("RGB", (4, 4)), "BMP"), 10**6)


def test_a_bomb_is_refused_from_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 14000, 14000, 8, 2, 0, 0, 0))
    with pytest.raises(BadImage, match="max_image_pixels|bomb"):
        decode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")), 50_000_000)


def test_the_evaluation_view_is_channels_first_and_normalised() -> None:
    view = evaluation_view(Image.new("RGB", (30, 20), (255, 0, 128)), 16)
    assert view.shape == (3, 16, 16) and view.dtype == np.uint8
    values = normalise(view[None], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    np.testing.assert_allclose(values[0, :, 0, 0], [1, -1, 128 / 127.5 - 1], atol=1e-6)
