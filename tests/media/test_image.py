"""Pictures of every format come in right."""

import io

import numpy as np
import pytest
from PIL import Image

import zoo
from helpers import hwc, psnr
from util.media.image import image_size, read_image


def decode(content: bytes) -> np.ndarray:
    return hwc(read_image(io.BytesIO(content)))


@pytest.mark.parametrize(
    "form, options, least",
    [
        ("PNG", {}, 99),
        ("BMP", {}, 99),
        ("TIFF", {}, 99),
        ("TIFF", {"compression": "tiff_lzw"}, 99),
        ("WEBP", {"lossless": True}, 99),
        ("WEBP", {}, 30),
        ("JPEG", {"quality": 95}, 35),
        ("JPEG", {"quality": 95, "progressive": True}, 35),
        ("AVIF", {"quality": 95}, 33),
        ("GIF", {}, 25),
        ("PPM", {}, 99),
    ],
)
def test_formats(form, options, least):
    pixels = zoo.smooth(60, 90)
    content = zoo.encode_image(pixels, form, **options)
    assert image_size(io.BytesIO(content)) == (60, 90)
    got = decode(content)
    assert np.array_equal(got, pixels) if least == 99 else psnr(got, pixels) > least


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(form, orientation):
    pixels = zoo.smooth(48, 80)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = zoo.STORED[orientation](pixels)
    content = zoo.encode_image(np.ascontiguousarray(stored), form, exif=exif)
    assert image_size(io.BytesIO(content)) == (48, 80)
    assert psnr(decode(content), pixels) > 25


def test_alpha_is_composed_over_white():
    pixels = zoo.smooth(40, 40, 4)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    for form in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        got = decode(zoo.encode_image(pixels, form, **options))
        assert np.abs(got - expected).max() <= 1.5
    palette = Image.fromarray(pixels[..., :3]).quantize(16)
    hidden = np.asarray(palette) == 3
    assert hidden.any()
    for form in ("PNG", "GIF"):
        got = decode(zoo.encode_image(palette, form, transparency=3))
        assert (got[hidden] == 255).all()
        assert np.array_equal(got[~hidden], np.asarray(palette.convert("RGB"))[~hidden])


def test_modes_are_converted_properly():
    grey = zoo.smooth(40, 60, 1)[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    wide = grey.astype(np.uint16) << 8
    for form in ("PNG", "TIFF"):
        for pixels in (wide, grey):
            assert np.array_equal(decode(zoo.encode_image(pixels, form)), expected)
    pgm = b"P5 60 40 65535 " + wide.astype(">u2").tobytes()
    assert np.array_equal(decode(pgm), expected)
    inverted = io.BytesIO()
    Image.fromarray(65535 - wide).save(inverted, "TIFF", tiffinfo={262: 0})
    assert np.array_equal(decode(inverted.getvalue()), expected)
    colours = Image.fromarray(zoo.smooth(40, 60))
    for form, least in (("JPEG", 30), ("TIFF", 60)):
        content = zoo.encode_image(colours.convert("CMYK"), form)
        assert psnr(decode(content), colours) > least, form
    for mode in ("P", "1"):
        picture = colours.convert(mode)
        expected = np.asarray(picture.convert("RGB"))
        assert np.array_equal(decode(zoo.encode_image(picture, "PNG")), expected)


def test_the_first_frame_of_an_animation_is_the_picture():
    first, second = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    for form in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        content = zoo.encode_image(first, form, save_all=True, append_images=[second], **options)
        assert decode(content)[15, 20].tolist() == [255, 0, 0]


def test_signed_pixels_are_named():
    signed = Image.frombytes("I;16", (60, 40), np.arange(2400, dtype="<i2").tobytes())
    content = io.BytesIO()
    signed.save(content, "TIFF", tiffinfo={339: 2})
    with pytest.raises(ValueError, match="signed pixels have no fixed range: store them as 8 bits"):
        image_size(content)
