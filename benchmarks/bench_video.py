"""Time the ways to read 32 frames of a clip, and measure the memory that each takes.

    python benchmarks/bench_video.py
    python benchmarks/bench_video.py --rounds 1 --clips 720p

Makes its clips in a temporary folder. Every way runs in a process of its own, on every clip; what
is printed is the best of the rounds. CPU seconds tell more where the machine is busy. All ways
give the same frames at the same size, except the floor, which only decodes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks.clips import make_clip  # noqa: E402
from util.media.video_reader import VideoReader  # noqa: E402

NUM_FRAMES = 32
# name: (what it is, arguments of make_clip, height and width of the frames that are kept)
CLIPS = {
    "720p": ("60 s 1280x720 H.264", {"height": 720, "width": 1280, "seconds": 20, "rounds": 3}),
    "480p": ("10 min 854x480 H.264", {"height": 480, "width": 854, "seconds": 60, "rounds": 10}),
    "hevc": (
        "60 s 1920x1080 HEVC",
        {"height": 1080, "width": 1920, "seconds": 10, "rounds": 6, "codec": "libx265"},
    ),
}
SIZES = {"720p": (560, 1008), "480p": (476, 840), "hevc": (560, 1008)}


def pick(num_frames: int) -> list[int]:
    """Return the indices that qwen-vl-utils takes."""
    return torch.linspace(0, num_frames - 1, NUM_FRAMES).round().long().tolist()


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (num_frames, 3, height, width) as qwen-vl-utils does."""
    return F.interpolate(frames, size, mode="bicubic", antialias=True)


def decode_everything(path, size):
    """Decode everything to RGB, then pick: the original's way."""
    import av

    # What torchvision.io.read_video did, until torchvision dropped it.
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = torch.as_tensor(np.stack(frames)).permute(0, 3, 1, 2)
    return resize(frames[pick(len(frames))], size)


def decord(path, size):
    """decord, as it comes."""
    from decord import VideoReader as Decord

    reader = Decord(path)
    frames = reader.get_batch(pick(len(reader))).asnumpy()
    return resize(torch.from_numpy(frames).permute(0, 3, 1, 2), size)


def torchcodec(path, size):
    """torchcodec, as it comes: one thread."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path)
    return resize(decoder.get_frames_at(pick(len(decoder))).data, size)


def torchcodec_fastest(path, size):
    """torchcodec, all threads, no scan."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=0, seek_mode="approximate")
    return resize(decoder.get_frames_at(pick(len(decoder))).data, size)


def qwen_vl_utils(path, size, backend):
    os.environ["FORCE_QWENVL_VIDEO_READER"] = backend
    from qwen_vl_utils.vision_process import VIDEO_READER_BACKENDS, fetch_video

    VIDEO_READER_BACKENDS["torchvision"] = VIDEO_READER_BACKENDS[backend]  # fail, do not fall back
    item = {"video": path, "nframes": NUM_FRAMES}
    return fetch_video(item | {"resized_height": size[0], "resized_width": size[1]})


def qwen_vl_utils_torchcodec(path, size):
    """qwen-vl-utils with torchcodec."""
    return qwen_vl_utils(path, size, "torchcodec")


def qwen_vl_utils_decord(path, size):
    """qwen-vl-utils with decord."""
    return qwen_vl_utils(path, size, "decord")


def ours(path, size):
    """Ours, all threads."""
    with VideoReader(path, num_threads=0) as reader:
        return reader.get_frames_at(pick(len(reader)), *size)


def ours_one_thread(path, size):
    """Ours, as it comes: one thread."""
    with VideoReader(path) as reader:
        return reader.get_frames_at(pick(len(reader)), *size)


def floor(path, size, num_threads=0):
    """Floor: frames that must be decoded, all threads."""
    with VideoReader(path, num_threads) as reader:
        wanted = sorted({reader._times[i] for i in pick(len(reader))})
        start, cpu_start = time.perf_counter(), time.process_time()
        num_frames = sum(1 for _ in reader._decode_sparsely(wanted))
        assert num_frames == NUM_FRAMES
        return time.perf_counter() - start, time.process_time() - cpu_start


def floor_one_thread(path, size):
    """Floor, one thread."""
    return floor(path, size, num_threads=1)


WAYS = [
    *(decode_everything, decord, torchcodec, torchcodec_fastest, qwen_vl_utils_torchcodec),
    *(qwen_vl_utils_decord, ours, ours_one_thread, floor, floor_one_thread),
]


def memory(field: str, file: str = "/proc/self/status") -> int:
    """Return a field of a file under /proc in bytes."""
    status = Path(file).read_text().split("\n")
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def measure(name: str, path: str, size: tuple[int, int]) -> dict:
    """Read `path` once, in this process; return seconds and peak memory above idle, or an error."""
    way = next(way for way in WAYS if way.__name__ == name)
    for module in ("decord", "torchcodec.decoders", "qwen_vl_utils"):
        if module.split(".")[0] in name:
            __import__(module)
    resize(torch.zeros((1, 3, 64, 64), dtype=torch.uint8), (32, 32))
    Path("/proc/self/clear_refs").write_text("5")  # begin to measure the peak anew
    idle = memory("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    result = way(path, size)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if isinstance(result, tuple):  # the way has its own clock
        seconds, cpu_seconds = result
    else:
        assert result.shape == (NUM_FRAMES, 3, *size)
    return {"seconds": seconds, "cpu": cpu_seconds, "peak": memory("VmHWM") - idle}


def measure_apart(name: str, path: str, size: tuple[int, int]) -> dict:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--measure", json.dumps([name, path, size])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"ended with {result.returncode}"]
        return {"error": lines[-1][:60]}
    return json.loads(result.stdout.splitlines()[-1])


def bytes_of_everything(name: str) -> int:
    """Return how much memory decode_everything takes for a clip."""
    arguments = CLIPS[name][1]
    num_frames = arguments["seconds"] * arguments["rounds"] * 30
    return num_frames * arguments["height"] * arguments["width"] * 3 * 2  # a list, and its stack


def bench(names: list[str], num_rounds: int) -> None:
    """Make the clips, measure every way, print a table for each clip."""
    free = memory("MemAvailable", "/proc/meminfo")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            what, arguments = CLIPS[name]
            path = make_clip(f"{folder}/{name}.mp4", **arguments)
            print(f"\n{what}, {NUM_FRAMES} frames at {SIZES[name][1]}x{SIZES[name][0]}")
            print(f"{'':55}  seconds  CPU seconds  MB above idle")
            for way in WAYS:
                title = way.__doc__.rstrip(".")
                if way is decode_everything and bytes_of_everything(name) > 0.7 * free:
                    print(f"{title:55}  needs {bytes_of_everything(name) / 1e9:.0f} GB: left out")
                    continue
                results = [
                    measure_apart(way.__name__, path, SIZES[name]) for _ in range(num_rounds)
                ]
                if errors := [r["error"] for r in results if "error" in r]:
                    print(f"{title:55}  {errors[0]}")
                    continue
                seconds, cpu = (min(r[key] for r in results) for key in ("seconds", "cpu"))
                peak = max(r["peak"] for r in results) / 1e6
                print(f"{title:55}  {seconds:7.2f}  {cpu:11.2f}  {peak:13.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements; the best counts")
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=list(CLIPS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
    else:
        bench(arguments.clips, arguments.rounds)


if __name__ == "__main__":
    main()
