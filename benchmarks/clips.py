"""Clips for the benchmarks: a camera that pans over a photograph, encoded by PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
PHOTO = REPO / "train_data" / "coffee.jpg"


def make_clip(
    path: str, height: int, width: int, seconds: int, rounds: int = 1, codec="libx264", fps=30
) -> str:
    """Write a clip of `rounds` times `seconds` and return its path.

    The encoder runs for the first round only; the others repeat its packets, so that long clips
    are made quickly. Groups of pictures, B-frames and quality are the encoder's defaults.
    """
    presets = {"libx264": "veryfast", "libx265": "ultrafast"}
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"preset": presets[codec]})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        packets = []
        for pixels in camera_pan(height, width, num_frames=seconds * fps):
            packets += stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
        packets += stream.encode()
        ticks = round(seconds / packets[0].time_base)
        for i in range(rounds):
            for packet in packets:
                if i:
                    packet.pts += ticks
                    packet.dts += ticks
                container.mux(_copy(packet))
    return path


def _copy(packet: av.Packet) -> av.Packet:
    # Writing a packet empties it and rescales its times.
    copy = av.Packet(bytes(packet))
    copy.stream, copy.time_base = packet.stream, packet.time_base
    copy.pts, copy.dts, copy.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
    return copy


def camera_pan(height: int, width: int, num_frames: int):
    """Yield frames (height, width, 3) uint8 of a window that moves over a photograph, with noise.

    Noise and motion keep the encoder from making frames that cost nothing to decode.
    """
    photo = Image.open(PHOTO).convert("RGB").resize((width * 3 // 2, height * 3 // 2))
    photo = np.asarray(photo)
    random = np.random.default_rng(0)
    noise = random.integers(-6, 7, (height + 64, width + 64, 1), dtype=np.int16)
    for i in range(num_frames):
        angle = 2 * np.pi * i / 240
        y = round(height / 4 * (1 + np.sin(angle)))
        x = round(width / 4 * (1 + np.cos(angle)))
        dy, dx = random.integers(0, 64, 2)
        frame = photo[y : y + height, x : x + width] + noise[dy : dy + height, dx : dx + width]
        yield frame.clip(0, 255).astype(np.uint8)
