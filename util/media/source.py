"""Items of the data: what keys they have, and where their bytes come from.

An item is a content item of a message: {"type": "image", "image": source, ...} or {"type":
"video", "video": source or list of sources, ...}. A source is a local path, a file:// or http(s)
URL, a base64 data URI, bytes, or a PIL image. Further keys and their meaning: IMAGE_KEYS and
VIDEO_KEYS, as in qwen-vl-utils.
"""

import base64
import binascii
import ipaddress
import itertools
import math
import os
import queue
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from io import BytesIO

from PIL import Image

from util.config import make_visible

# Limits in pixels after resizing, and an exact size, which is rounded to whole tokens.
IMAGE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# Frames a second, or a number of frames; bounds for the number; the part to read, in seconds.
NUM_FRAMES_KEYS = ("fps", "nframes", "min_frames", "max_frames")
FRAME_SIZE_KEYS = (*IMAGE_KEYS, "total_pixels")
VIDEO_KEYS = (*FRAME_SIZE_KEYS, *NUM_FRAMES_KEYS, "video_start", "video_end")

REMOTE_SECONDS = 30  # a URL must have answered completely by then
MAX_REMOTE_BYTES = 256 * 2**20
RETRY_SECONDS = (1, 3, 9)  # to wait before a URL is asked again that may answer later


def check_media_item(item: dict) -> None:
    """Raise ValueError where an item's source or keys are not what this module can read."""
    kind = item["type"]
    source = item.get(kind)
    frames = source if isinstance(source, list) and kind == "video" else [source]
    if not frames or not all(f and isinstance(f, str | bytes | Image.Image) for f in frames):
        also = ", or a list of pictures" if kind == "video" else ""
        raise ValueError(f'an item of type {kind} needs a string "{kind}"{also}')
    keys = IMAGE_KEYS if kind == "image" else VIDEO_KEYS
    if "timestamps" in item:
        _check_times(item, frames if frames is source else None)
    for key in item.keys() - {"type", kind, "timestamps"}:
        value = item[key]
        if key not in keys:
            raise ValueError(f"unknown key {key!r}: an item of type {kind} takes {', '.join(keys)}")
        is_whole = key not in ("fps", "video_start", "video_end")
        is_number = isinstance(value, int if is_whole else (int, float))
        is_number = is_number and not isinstance(value, bool) and value < 1e12
        if not is_number or value < 0 or (value == 0 and key != "video_start"):
            what = "a whole number" if is_whole else "a number"
            least = "of 0 or more" if key == "video_start" else "above 0"
            raise ValueError(f"{key} {value!r:.40}: must be {what} {least}")
        if frames is source and key not in (*FRAME_SIZE_KEYS, "fps"):
            raise ValueError(f"{key}: does not go with a list of frames, which are all taken")
    if "fps" in item and "nframes" in item:
        raise ValueError("fps and nframes exclude each other")
    if item.get("min_frames", 0) > item.get("max_frames", math.inf):
        raise ValueError("min_frames is above max_frames")
    if ("resized_height" in item) != ("resized_width" in item):
        raise ValueError("resized_height and resized_width go together")


def _check_times(item: dict, frames: list | None) -> None:
    times = item["timestamps"]
    if frames is None or "fps" in item:
        raise ValueError("timestamps: go with a list of frames, and without fps")
    kinds = {type(time) for time in times} if isinstance(times, list) else {None}
    is_right = kinds <= {int, float} and len(times) == len(frames)
    is_right = is_right and all(0 <= time < 1e12 for time in times)
    if not is_right or any(a >= b for a, b in itertools.pairwise(times)):
        raise ValueError("timestamps: must be a list of ascending seconds, one for each frame")


def map_paths(function, source):
    """Return `source`, or a list of sources, with `function` applied to those that are paths."""
    if isinstance(source, list):
        return [map_paths(function, one) for one in source]
    is_path = isinstance(source, str) and not source.startswith(("http://", "https://", "data:"))
    return function(source) if is_path else source


def describe(source) -> str:
    """Return what to call a source in a message: a path or URL, or the beginning of anything."""
    if isinstance(source, list):
        return f"{len(source)} frames from {describe(source[0])}"
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    text = str(source)
    shown = make_visible(text.replace("\n", "\\n"))
    if text.startswith("data:") or len(shown) > 300:
        return f"{shown[:40]}... ({len(text):,} characters)"
    return shown


def check_local_file(path: str) -> None:
    """Raise ValueError where `path` is not a readable, non-empty, regular file."""
    if os.path.isdir(path):
        raise ValueError("is a folder, not a file")
    if not os.path.lexists(path):
        raise ValueError("no such file")
    if not os.path.exists(path):
        raise ValueError("is a link that leads nowhere")
    if not os.path.isfile(path):  # also true of devices and pipes, which could block for ever
        raise ValueError("is not a regular file")
    if os.path.getsize(path) == 0:
        raise ValueError("is empty")


# How files begin that stand under another one's name, and what to do with them.
FIRST_BYTES = {
    rb"%PDF": "a PDF document: export its pages as pictures",
    rb"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` fetches the file itself",
    rb"(?i)\s*<(!doctype html|html)": "a web page, as servers send for a file: fetch it anew",
    rb"\s*<(\?xml|svg)": "XML: convert a drawing (SVG) to PNG, fetch anew what a server refused",
    rb"....ftyp(heic|heix|mif1|msf1)": "a HEIC picture: convert it to JPEG",
    rb"PAR1": "a Parquet file: the name of one with data must end in .parquet",
    rb"ARROW1|\xff{4}": "an Arrow file: datasets.Dataset.from_file(FILE).to_json('data.jsonl') "
    "converts it",
    rb"\x1f\x8b": "compressed: `gunzip` unpacks it",
    rb"PK\x03\x04": "a ZIP archive: `unzip` unpacks it",
}


def what_it_is(start: bytes) -> str | None:
    """Return what a file is that begins so, and what to do with it, where that is known."""
    found = (text for pattern, text in FIRST_BYTES.items() if re.match(pattern, start, re.S))
    return next(found, None)


def local_path(path: str) -> str:
    """Return the path in a file:// URL; other paths stay as they are."""
    return urllib.parse.unquote(path[len("file://") :]) if path.startswith("file://") else path


def resolve(source, allow_remote_media: bool = False):
    """Return a source as the path of a regular file, a BytesIO, or a PIL image."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        if not allow_remote_media:
            raise ValueError(
                "media are not fetched from the network: download it, or use --allow_remote_media"
            )
        source = fetch(source)
    elif isinstance(source, str) and source.startswith("data:"):
        try:
            source = base64.b64decode("".join(source.partition(",")[2].split()), validate=True)
        except binascii.Error as error:
            raise ValueError(f"is not a base64 data URI: {error}") from error
    if isinstance(source, bytes):
        if not source:
            raise ValueError("is empty")
        return BytesIO(source)
    source = local_path(source)
    check_local_file(source)
    return source


def is_public(url: str) -> bool:
    """Return whether no address of a URL's host is of this machine or its own networks."""
    try:
        found = socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except OSError:
        return True  # to be told as it is opened; behind a proxy, such a name can be right
    return all(
        ipaddress.ip_address(address[0].partition("%")[0]).is_global for *_, address in found
    )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http(s) only, and from public hosts to no others.

    What a foreign server names must not be fetched from behind the user's firewall.
    """

    def redirect_request(self, request, fp, code, msg, headers, newurl):
        if not newurl.startswith(("http://", "https://")):
            raise ValueError(f"it redirects to {describe(newurl)}, which is not http(s)")
        if is_public(request.full_url) and not is_public(newurl):
            raise ValueError(f"it redirects to {describe(newurl)}, which is not a public address")
        return super().redirect_request(request, fp, code, msg, headers, newurl)


def _read_url(url: str) -> bytes:
    opener = urllib.request.build_opener(_Redirects)
    for pause in (*RETRY_SECONDS, None):
        try:
            with opener.open(url, timeout=REMOTE_SECONDS) as response:
                return response.read(MAX_REMOTE_BYTES + 1)
        except OSError as error:
            is_busy = getattr(error, "code", None) in (429, 503)
            is_reset = isinstance(getattr(error, "reason", error), ConnectionResetError)
            if pause is None or not (is_busy or is_reset):
                raise
        time.sleep(pause)


def fetch(url: str) -> bytes:
    """Return what a URL holds. Raises ValueError where it fails, is too large, or stalls."""
    answers = queue.SimpleQueue()

    def read():
        try:
            answers.put(_read_url(url))
        except Exception as error:
            answers.put(error)

    # The time-out of a socket starts anew with every byte, so a trickle would never end.
    threading.Thread(target=read, daemon=True).start()
    try:
        answer = answers.get(timeout=REMOTE_SECONDS)
    except queue.Empty:
        answer = TimeoutError(f"no complete answer within {REMOTE_SECONDS} s")
    if isinstance(answer, Exception):
        raise ValueError(f"cannot be fetched: {answer}") from answer
    if len(answer) > MAX_REMOTE_BYTES:
        raise ValueError(f"is larger than {MAX_REMOTE_BYTES >> 20} MiB")
    return answer
