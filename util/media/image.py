"""Pictures: their size as they are shown, and their pixels, upright, over white."""

import enum
import re
import warnings
from contextlib import nullcontext
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from util.media.source import what_it_is

# What is opened, under whatever name: formats that Pillow (HEIF: a plug-in) decodes itself. EPS is
# a program, which Pillow has Ghostscript run.
FORMATS = "JPEG PNG WEBP GIF BMP DIB TIFF PPM ICO AVIF JPEG2000 HEIF TGA".split()
# Decoding takes up to 18 bytes a pixel, so these 1.8 GB. Pillow refuses twice its own limit, of
# pictures and of those inside of them (ICO), by their headers.
MAX_PIXELS = 100 * 10**6
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Where a PNG can say how it is turned: its own chunk, as ImageMagick writes it, as Adobe does.
PNG_EXIF_KEYS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}

# Tags of TIFF, and a value of the last. Source: TIFF 6.0.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


class Remark(enum.IntFlag):
    """What is read, but perhaps not as it was meant."""

    NONE = 0
    MORE_PAGES = 1
    DARK = 2
    HDR = 4


def open_image(source: str | BytesIO | Image.Image):
    """Return a picture as a context manager that closes what it opened; its header is read."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    Image.init()
    try:
        image = Image.open(source, formats=[form for form in FORMATS if form in Image.OPEN])
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error))[0])
        raise ValueError(f"{pixels:,} pixels, over {MAX_PIXELS:,}: resize the file") from error
    except UnidentifiedImageError as error:
        raise ValueError(_why_unknown(source)) from error
    if image.format == "TIFF" and image.mode == "I" and 16 in image.tag_v2.get(BITS_PER_SAMPLE, ()):
        raise ValueError("signed pixels have no fixed range: store them as 8 bits")
    if image.mode == "F":
        raise ValueError("pixels in floating point have no fixed range: store them as 8 bits")
    return image


def _why_unknown(source: str | BytesIO) -> str:
    """Return why Pillow opens no picture there; a format that it would open is named."""
    with nullcontext(source) if isinstance(source, BytesIO) else open(source, "rb") as file:
        file.seek(0)
        start = file.read(64)
    if kind := what_it_is(start):
        return f"it is {kind}"
    others = [(name, test) for name, (_, test) in Image.OPEN.items() if name not in FORMATS]
    if names := [name for name, test in others if test and test(start) is True]:
        return f"{' or '.join(names)} is no format that is opened: convert it to PNG or JPEG"
    return "it is no picture of a known format"


def image_size(source: str | BytesIO | Image.Image) -> tuple[int, int]:
    """Return the (height, width) of a picture as it is shown, from its header."""
    with open_image(source) as image:
        width, height = image.size
        # Orientations 5 to 8 of the EXIF standard turn the picture by a quarter.
        return (width, height) if _orientation(image) >= 5 else (height, width)


def image_remarks(source: str | BytesIO | Image.Image) -> Remark:
    """Return what is odd about a picture, from its header; one of 16 bits is decoded."""
    with open_image(source) as image:
        remarks = Remark.NONE
        # In a JPEG, the others are for programs that know them: a thumbnail, a map of brightness.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            remarks |= Remark.MORE_PAGES
        # Sensors give 10 or 12 bits, and some programs store them in 16 as they are.
        if image.mode[0] == "I" and np.asarray(image).max() < 4096:
            remarks |= Remark.DARK
        return remarks


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened picture, 1 to 8, from its header."""
    if image.format == "PNG" and not image.info.keys() & PNG_EXIF_KEYS:
        return 1  # getexif() would decode the whole picture to look behind it
    if image.format == "TIFF":
        return 1  # Pillow itself turns these
    orientation = image.getexif().get(0x0112, 1)
    return orientation if orientation in range(1, 9) else 1


def read_image(source: str | BytesIO | Image.Image) -> torch.Tensor:
    """Decode a picture to (3, height, width) uint8 RGB, upright, alpha over white."""
    with open_image(source) as image:
        # Pillow turns these over at up to 8 bits only.
        is_inverted = image.format == "TIFF" and image.mode.startswith("I;16")
        is_inverted = is_inverted and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: convert("RGB") would clip instead of scaling
            pixels = np.asarray(image)
            if is_inverted:
                pixels = 65535 - pixels
            # Pillow opens 16-bit PGM as mode I too; of 32 bits, nobody knows what is white.
            if image.mode == "I" and not (pixels.min() >= 0 and 256 <= pixels.max() < 65536):
                raise ValueError("pixels of 32 bits have no fixed range: store them as 8 bits")
            image = Image.fromarray((pixels >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
