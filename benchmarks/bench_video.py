"""Time the ways to read 32 frames of a clip, and measure the memory that each takes.

    python -m benchmarks.bench_video
    python -m benchmarks.bench_video --rounds 1 --clips 720p

Makes its clips in a temporary folder. Every way runs in a process of its own, on every clip; what
is printed is the best of the rounds. All ways give the same frames at the same size, except the
floor, which only decodes. Ours and the floor run on one thread, as in a worker process.
"""

import argparse
import os
import re
import tempfile
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import psutil
import torch
import torch.nn.functional as F

from benchmarks.clips import make_clip
from benchmarks.common import print_header, print_row, run_alone
from util.media.video_reader import VideoReader

NUM_FRAMES = 32
H720 = {"height": 720, "width": 1280, "seconds": 20, "rounds": 3}
H480 = {"height": 480, "width": 854, "seconds": 60, "rounds": 10}
HEVC = {"height": 1080, "width": 1920, "seconds": 10, "rounds": 6, "codec": "libx265"}
# name: (what it is, arguments of make_clip, height and width of the frames that are kept)
CLIPS = {
    "720p": ("60 s 1280x720 H.264", H720, (560, 1008)),
    "480p": ("10 min 854x480 H.264", H480, (476, 840)),
    "hevc": ("60 s 1920x1080 HEVC", HEVC, (560, 1008)),
}


def pick(num_frames: int) -> list[int]:
    """Return the indices that qwen-vl-utils takes."""
    return torch.linspace(0, num_frames - 1, NUM_FRAMES).round().long().tolist()


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (num_frames, 3, height, width) as qwen-vl-utils does."""
    return F.interpolate(frames, size, mode="bicubic", antialias=True)


# ---------------------------------------------------------------- the ways


def everything(path, size):
    # What torchvision.io.read_video did, until torchvision dropped it.
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = torch.as_tensor(np.stack(frames)).permute(0, 3, 1, 2)
    return resize(frames[pick(len(frames))], size)


def decord(path, size):
    from decord import VideoReader as Decord

    reader = Decord(path)
    frames = reader.get_batch(pick(len(reader))).asnumpy()
    return resize(torch.from_numpy(frames).permute(0, 3, 1, 2), size)


def torchcodec(path, size, **options):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, **options)
    return resize(decoder.get_frames_at(pick(len(decoder))).data, size)


def qwen_vl_utils(path, size, backend):
    os.environ["FORCE_QWENVL_VIDEO_READER"] = backend
    from qwen_vl_utils.vision_process import VIDEO_READER_BACKENDS, fetch_video

    VIDEO_READER_BACKENDS["torchvision"] = VIDEO_READER_BACKENDS[backend]  # fail, do not fall back
    item = {"video": path, "nframes": NUM_FRAMES}
    return fetch_video(item | {"resized_height": size[0], "resized_width": size[1]})


def ours(path, size):
    with VideoReader(path, num_threads=1) as reader:
        return reader.get_frames_at(pick(len(reader)), *size)


def floor(path, size):
    """Return the seconds that decoding what must be decoded takes."""
    with VideoReader(path, num_threads=1) as reader:
        wanted = sorted({reader._times[i] for i in pick(len(reader))})
        start = time.perf_counter()
        num_frames = sum(1 for _ in reader._decode_sparsely(wanted))
        assert num_frames == NUM_FRAMES
        return time.perf_counter() - start


EVERYTHING = "decode everything to RGB, then pick: the original's way"
WAYS = {
    EVERYTHING: everything,
    "decord, as it comes": decord,
    "torchcodec, as it comes: one thread": torchcodec,
    "torchcodec, all threads, no scan": partial(
        torchcodec, num_ffmpeg_threads=0, seek_mode="approximate"
    ),
    "qwen-vl-utils with torchcodec": partial(qwen_vl_utils, backend="torchcodec"),
    "qwen-vl-utils with decord": partial(qwen_vl_utils, backend="decord"),
    "ours": ours,
    "floor: frames that must be decoded": floor,
}


# ---------------------------------------------------------------- the measurement


def measure(name: str, path: str, size: tuple[int, int]) -> dict:
    """Read `path` once, in this process; return seconds and peak memory above idle."""
    for module in ("decord", "torchcodec.decoders", "qwen_vl_utils"):
        if module.split(".")[0] in name.replace("-", "_"):
            __import__(module)
    resize(torch.zeros((1, 3, 64, 64), dtype=torch.uint8), (32, 32))
    Path("/proc/self/clear_refs").write_text("5")  # begin to measure the peak anew
    idle = psutil.Process().memory_info().rss
    start = time.perf_counter()
    result = WAYS[name](path, size)
    seconds = time.perf_counter() - start
    if isinstance(result, float):  # the way has its own clock
        seconds = result
    else:
        assert result.shape == (NUM_FRAMES, 3, *size)
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
    return {"seconds": seconds, "mb": (1024 * int(peak) - idle) / 1e6}


def bench(what: str, path: str, size: tuple[int, int], num_bytes: int, num_rounds: int) -> None:
    """Measure every way to read a clip, print a table; decoded, the clip takes `num_bytes`."""
    print_header(f"{what}, {NUM_FRAMES} frames of {size[1]}x{size[0]}", "s", "MB")
    for name in WAYS:
        if name == EVERYTHING and num_bytes > 0.7 * psutil.virtual_memory().available:
            print_row(name, f"needs {num_bytes / 1e9:.0f} GB: left out", "")
            continue
        rows = [run_alone("bench_video.measure", name, path, size) for _ in range(num_rounds)]
        if errors := [row["error"] for row in rows if "error" in row]:
            print_row(name, errors[0], "")
        else:
            seconds, megabytes = ([row[key] for row in rows] for key in ("seconds", "mb"))
            print_row(name, min(seconds), max(megabytes))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3, help="measurements; the best counts")
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=list(CLIPS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.clips:
            what, clip, size = CLIPS[name]
            path = make_clip(f"{folder}/{name}.mp4", **clip)
            num_frames = clip["seconds"] * clip["rounds"] * 30
            num_bytes = num_frames * clip["height"] * clip["width"] * 3 * 2  # a list, and its stack
            bench(what, path, size, num_bytes, arguments.rounds)


if __name__ == "__main__":
    main()
