"""Pages that open anywhere, without network: their frame, pictures, clips, loss curves."""

import base64
import difflib
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import jinja2
import torch
from PIL import Image

from util.config import UserError, make_visible
from util.media.image import read_image
from util.media.source import check_local_file, describe, local_path, resolve
from util.media.video_reader import VideoReader

TEMPLATES = Path(__file__).parent
MAX_PICTURE_SIDE = 720  # pixels; larger pictures are shrunk
MAX_CLIP_BYTES = 16 * 2**20  # larger clips are shown by one frame
MAX_MEDIA_BYTES = 64 * 2**20  # so are clips that would make the page hold more than this
MAX_METRICS_BYTES = 256 * 2**20
MAX_FRAMES_SHOWN = 4  # of a clip that is a list of pictures
# What browsers play. Phones write .mov, which is .mp4 under another name.
CLIP_TYPES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mp4", ".webm": "webm", ".ogv": "ogg"}
# A word of text, or one character of a script that is written without spaces (Chinese, Japanese).
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+|\s+|.")


def render_page(template: str, **values) -> str:
    """Return the page of a template beside this file: page_template.html is around it.

    Everything that comes from data or models is escaped. Hashes let the page's own style and
    script run, and nothing that slips in.
    Source: https://developer.mozilla.org/en-US/docs/Web/HTTP/Guides/CSP, hashes.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    source = (TEMPLATES / "page_template.html").read_text(encoding="utf-8")
    hashes = {}
    for name in ("style", "script"):
        content = re.search(f"<{name}>(.*?)</{name}>", source, re.S)[1]
        hashes[name] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return environment.get_template(template).render(**values, hashes=hashes)


def write_page(path: str, page: str, contents: str, sources: list[str]) -> None:
    """Write a page, and print its path, `contents` and size.

    Raises UserError where that fails, or `path` is a file that the page was made from.
    """
    if Path(path).resolve() in {Path(source).resolve() for source in sources}:
        raise UserError(f"{path}: would overwrite what the page is made from: name another file")
    try:
        Path(path).write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    print(f"{path}: {contents}, {len(page) / 2**10:,.0f} KiB")


def mark_differences(first: str, second: str) -> list[list[tuple[str, bool]]]:
    """Return both texts in pieces (text, differs from the other text), compared word by word."""
    words = [WORD.findall(first), WORD.findall(second)]
    pieces = [[], []]
    # In long texts the matcher anchors on no word that makes up over 1 %: an answer that repeats
    # itself a thousand times would take it minutes.
    matcher = difflib.SequenceMatcher(None, *words)
    if first == second:
        return [[(make_visible(first), False)]] * 2 if first else pieces
    for tag, *ends in matcher.get_opcodes():
        for side in (0, 1):
            text = "".join(words[side][ends[2 * side] : ends[2 * side + 1]])
            # A space that happens to stand in both texts would cut one mark into many.
            differs = tag != "equal" or text == " "
            if text and pieces[side] and pieces[side][-1][1] == differs:
                text = pieces[side].pop()[0] + text
            if text:
                pieces[side].append((text, differs))
    return [[(make_visible(text), differs) for text, differs in side] for side in pieces]


def data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def picture_uri(pictures: Iterable[torch.Tensor], max_side: int = MAX_PICTURE_SIDE) -> str:
    """Return pictures (3, height, width) uint8, side by side and shrunk, as a data URI."""
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    widths, height = [image.width for image in images], max(image.height for image in images)
    strip = Image.new("RGB", (sum(widths), height))
    for i, image in enumerate(images):
        strip.paste(image, (sum(widths[:i]), 0))
    strip.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    return data_uri("image/jpeg", buffer.getvalue())


def embed(item: dict, folder: Path, sizes: list[int]) -> dict:
    """Return a picture or clip as the template wants it: type, name, uri, still, note.

    `uri` is None for a clip that is not embedded, `still` the middle frame of a clip, or some of a
    list. What cannot be read is named on the page and on the terminal. `sizes` of the clips that
    the page holds already, in bytes; that of this one is added.
    """
    source = item[item["type"]]
    name = make_visible(_name(source))
    media = {"type": item["type"], "name": name, "uri": None, "still": None, "note": ""}
    try:
        if isinstance(source, list):
            shown = source[:: -(-len(source) // MAX_FRAMES_SHOWN)]
            still = picture_uri([read_image(_find(frame, folder)) for frame in shown])
            return media | {"still": still, "note": f"{len(shown)} of {len(source)} frames"}
        found = _find(source, folder)
        if item["type"] == "image":
            return media | {"uri": picture_uri([read_image(found)])}
        with VideoReader(found) as reader:
            frames = reader.get_frames_at([len(reader) // 2])
        media["still"] = picture_uri(list(frames))
        kind = "" if isinstance(found, io.BytesIO) else Path(found).suffix.lower()
        if kind not in CLIP_TYPES:
            return media | {"note": f"one frame: browsers do not play {kind or 'this'}"}
        size = Path(found).stat().st_size
        if size > MAX_CLIP_BYTES:
            return media | {"note": f"one frame: over {MAX_CLIP_BYTES >> 20} MiB, not embedded"}
        if sum(sizes) + size > MAX_MEDIA_BYTES:
            note = f"one frame: the page holds {MAX_MEDIA_BYTES >> 20} MiB of clips at most"
            print(f"warning: {describe(source)}: {note}", file=sys.stderr)
            return media | {"note": note}
        sizes.append(size)
        return media | {"uri": data_uri(f"video/{CLIP_TYPES[kind]}", Path(found).read_bytes())}
    except Exception as error:  # whatever a decoder throws: the page says which file it was
        note = make_visible(f"cannot be shown: {error}")
        print(f"warning: {describe(source)}: {note}", file=sys.stderr)
        return media | {"note": note}


def _name(source: str | list) -> str:
    """Return what to call a source below its picture."""
    if isinstance(source, list):
        return f"{_name(source[0])} to {_name(source[-1])}"
    return source.partition(";")[0] if source.startswith("data:") else Path(source).name


def _find(source: str, folder: Path) -> str | io.BytesIO:
    """Return a source as a path, in the current folder or in `folder`, or as its bytes."""
    if source.startswith(("http://", "https://")):
        raise ValueError("it is not fetched from the network")
    if source.startswith("data:"):
        return resolve(source)
    path = local_path(source)
    return resolve(next((str(p) for p in (Path(path), folder / path) if p.exists()), path))


def read_curve(path: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) points of a metrics.jsonl: each loss, its mean, held-out losses."""
    try:
        found = next((p for p in (Path(path), folder / path) if p.is_file()), Path(path))
        check_local_file(str(found))
        if found.stat().st_size > MAX_METRICS_BYTES:
            raise ValueError(f"is larger than {MAX_METRICS_BYTES >> 20} MiB")
        rows = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
        points = {
            name: [
                (int(row["global_step"]), float(row[name]))
                for row in rows
                if row.get(name) is not None  # null: of a step that was skipped
            ]
            for name in ("loss", "eval_loss")
        }
    except Exception as error:  # whatever the file of someone else holds
        print(f"warning: {describe(path)}: no loss curve: {error!r}", file=sys.stderr)
        return {}
    # No run is so long and no loss so high, and NaN is neither; the axes could not be drawn.
    points = {
        name: [(x, y) for x, y in line if 0 <= x < 1e12 and abs(y) < 1e12]
        for name, line in points.items()
    }
    window = mean_window(len(points["loss"]))
    recent = [points["loss"][max(0, i - window + 1) : i + 1] for i in range(len(points["loss"]))]
    points["mean"] = [(part[-1][0], sum(value for _, value in part) / len(part)) for part in recent]
    return points


def mean_window(num_steps: int) -> int:
    """Return over how many of so many steps the mean of a loss curve is taken."""
    return max(1, num_steps // 20)


def draw_curves(files: list[dict]) -> dict | None:
    """Return the loss curves of the runs as the template draws them, None where there is none.

    `width` and `height` of the drawing area; `window`: steps that a mean is over; `lines`: (file
    number, name, SVG points); `x_ticks` and `y_ticks`: (position, label).
    """
    width, height = 400, 150
    paths = [file["metrics"] for file in files]
    folders = [Path(file["path"]).parent for file in files]
    curves = [read_curve(str(p), f) if p else {} for p, f in zip(paths, folders)]
    # Base and trained model can name the same run: one curve then.
    curves[0] = {} if paths[0] == paths[1] else curves[0]
    points = [point for curve in curves for line in curve.values() for point in line]
    if not points:
        return None
    last_step, top = max(1, *(x for x, _ in points)), max(1e-6, *(y for _, y in points))
    x_ticks = {last_step * part // 4 for part in range(5)}
    step = 10.0 ** math.floor(math.log10(top))
    step = next(step * factor for factor in (0.25, 0.5, 1, 2.5) if top <= 4 * step * factor)
    top = math.ceil(top / step) * step

    def place(x: float, y: float) -> str:
        return f"{width * x / last_step:.1f},{height * (1 - y / top):.1f}"

    return {
        "width": width,
        "height": height,
        "window": mean_window(max(len(curve.get("loss", [])) for curve in curves)),
        "lines": [
            (side, name, " ".join(place(*point) for point in line))
            for side, curve in enumerate(curves)
            for name, line in curve.items()
            if line
        ],
        "x_ticks": [(width * x / last_step, x) for x in sorted(x_ticks)],
        "y_ticks": [
            (height * (1 - n * step / top), f"{n * step:g}") for n in range(round(top / step) + 1)
        ],
    }
