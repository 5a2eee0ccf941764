"""The media zoo: pictures and clips of every format, made by Pillow and PyAV.

Each maker takes the path to write. Frames of clips differ from each other, and move, so that a
wrong frame is not taken for the right one.
"""

import io
import random
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

HEVC = "keyint=12:log-level=none"
# Clips whose decoders must yield, when decoding sparsely, exactly what a full decode yields:
# (names, codec, options, what else make_clip takes). Groups of pictures are short, so that there
# are several in a clip.
KINDS = [
    ("h264.mp4 h264.flv", "libx264", {"g": "12"}, {}),
    ("h264.mov h264.mkv h264.ts h264.avi", "libx264", {"g": "12", "bf": "3"}, {}),
    ("one_group.mp4", "libx264", {"g": "250"}, {}),
    ("short_groups.mp4", "libx264", {"x264-params": "keyint=3:min-keyint=1:bframes=2"}, {}),
    ("all_intra.mp4", "libx264", {"g": "1"}, {}),
    ("fragmented.mp4", "libx264", {"g": "12"}, {"mux": {"movflags": "frag_keyframe+empty_moov"}}),
    ("faststart.mp4", "libx264", {"g": "12"}, {"mux": {"movflags": "faststart"}}),
    ("negative_dts.mp4", "libx264", {"g": "12"}, {"mux": {"movflags": "negative_cts_offsets"}}),
    ("open_gop.mp4 open_gop.ts", "libx264", {"x264-params": "open-gop=1:keyint=12"}, {}),
    ("intra_refresh.mkv", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}, {}),
    ("interlaced.mp4", "libx264", {"x264-params": "tff=1:keyint=12"}, {}),
    ("ten_bit.mkv", "libx264", {"g": "12"}, {"pix_fmt": "yuv420p10le"}),
    ("full_chroma.mp4", "libx264", {"g": "12"}, {"pix_fmt": "yuv444p"}),
    ("variable_rate.mp4 variable_rate.mkv", "libx264", {"g": "12"}, {"ticks": "variable"}),
    ("late_start.mp4", "libx264", {"g": "12"}, {"first_tick": 50}),
    ("one_frame.mp4", "libx264", {}, {"num_frames": 1}),
    ("two_frames.mkv", "libx264", {}, {"num_frames": 2}),
    ("rotated.mp4", "libx264", {"g": "12"}, {"rotation": 90}),
    ("hevc.mp4 hevc.mkv", "libx265", {"x265-params": HEVC}, {}),
    ("hevc_open_gop.ts", "libx265", {"x265-params": f"{HEVC}:open-gop=1"}, {}),
    (
        "hevc_layers.mp4",
        "libx265",
        {"x265-params": f"{HEVC}:temporal-layers=3:b-adapt=0:bframes=3"},
        {"pix_fmt": "yuv420p10le"},
    ),
    ("vp9.webm", "libvpx-vp9", {"g": "12", "cpu-used": "8", "lag-in-frames": "16"}, {}),
    ("vp8.webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}, {}),
    ("av1.mp4", "libsvtav1", {"g": "12", "preset": "12"}, {}),
    ("mpeg2.ts mpeg2.mpg", "mpeg2video", {"g": "12", "bf": "2"}, {}),
    ("mpeg4.mp4 mpeg4.avi", "mpeg4", {"g": "12", "bf": "2"}, {}),
    ("wmv.wmv", "wmv2", {"g": "12"}, {}),
    ("motion_jpeg.avi", "mjpeg", {}, {"pix_fmt": "yuvj420p"}),
    ("prores.mov", "prores_ks", {}, {"pix_fmt": "yuv422p10le"}),
    ("animated.gif", "gif", {}, {"pix_fmt": "rgb8"}),
]
CLIPS = {name: kind for names, *kind in KINDS for name in names.split()}
CLIP_RATE = 25
NUM_FRAMES = 40
# How an upright picture is stored under each orientation of the EXIF standard.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


def clip_frame(i: int, height: int, width: int) -> np.ndarray:
    """Return frame `i` of a clip: a moving smooth pattern and a bar that counts."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x * a + y * b) / 9 + i * c) for a, b, c in ((1, 2, 0.3), (2, -1, 0.2))]
    pixels = np.stack([*(128 + 90 * wave for wave in waves), 255 * x / width], axis=-1)
    pixels[: height // 4, : width * (i % 50 + 1) // 50] = (250, 20, 5 * i % 256)
    return pixels.astype(np.uint8)


def make_clip(
    path: Path,
    codec: str,
    options: dict,
    num_frames: int = NUM_FRAMES,
    height: int = 96,
    width: int = 144,
    pix_fmt: str = "yuv420p",
    ticks: str = "constant",
    first_tick: int = 0,
    rotation: int = 0,
    aspect: Fraction | None = None,
    picture: np.ndarray | None = None,
    mux: dict | None = None,
) -> str:
    """Write a clip. `ticks`: frames 1/25 s apart, or "variable": 1/25 to 1 s apart.

    `aspect` is that of a pixel; `picture` (height, width, 4) RGBA stands in place of all frames.
    """
    gaps = random.Random(0)
    with av.open(str(path), "w", options=mux or {}) as container:
        stream = container.add_stream(codec, rate=CLIP_RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.time_base = Fraction(1, CLIP_RATE)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        tick = first_tick
        for i in range(num_frames):
            if picture is None:
                frame = av.VideoFrame.from_ndarray(clip_frame(i, height, width), format="rgb24")
            else:
                frame = av.VideoFrame.from_ndarray(picture, format="rgba")
            if pix_fmt == "rgb8":  # the encoder does not convert to palettes
                frame = frame.reformat(format="rgb8")
            frame.pts, frame.time_base = tick, Fraction(1, CLIP_RATE)
            container.mux(stream.encode(frame))
            tick += 1 if ticks == "constant" else gaps.choice((1, 1, 2, 5, 25))
        container.mux(stream.encode())
    return str(path)


def make_zoo_clip(folder: Path, name: str) -> str:
    """Write a clip of CLIPS, once, and return its path."""
    codec, options, more = CLIPS[name]
    path = folder / name
    return str(path) if path.exists() else make_clip(path, codec, options, **more)


def copy_packets(source: str, path: Path, change=list, *values, **how) -> str:
    """Copy a clip without decoding it, `change(packets, *values)` in place of its packets."""
    with av.open(source) as old, av.open(str(path), "w", **how) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in change([packet for packet in old.demux(video=0) if packet.size], *values):
            packet.stream = stream
            new.mux(packet)
    return str(path)


def earlier(packets: list[av.Packet], seconds: Fraction) -> list[av.Packet]:
    """Change times. In mp4, an edit list hides what comes before 0, as phones and editors do."""
    shift = round(seconds / packets[0].time_base)
    for packet in packets:
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
    return packets


def with_equal_times(packets: list[av.Packet], i: int) -> list[av.Packet]:
    """Give packet `i` the time of the one before it; frames must not be reordered."""
    packets[i].pts, packets[i].dts = packets[i - 1].pts, packets[i - 1].dts
    return packets


def with_unshown(packets: list[av.Packet], i: int) -> list[av.Packet]:
    """Add a frame of VP8, before packet `i`, that is decoded and not shown.

    Encoders write such frames for others to refer to (alternate references).
    """
    content = bytes(packets[i])
    unshown = av.Packet(bytes([content[0] & ~0x10]) + content[1:])
    unshown.pts, unshown.dts = packets[i].pts, packets[i].dts
    unshown.time_base = packets[i].time_base
    return [*packets[:i], unshown, *packets[i:]]


def mirror(path: Path) -> str:
    """Have a player show an mp4 mirrored: set the matrix of its track. Source: ISO 14496-12."""
    content = bytearray(path.read_bytes())
    # Behind the name: version, flags, times, number, duration, layer, volume.
    start = content.index(b"tkhd") + 4 + 40
    content[start : start + 4] = struct.pack(">i", -0x10000)
    path.write_bytes(content)
    return str(path)


def make_audio(path: Path) -> str:
    """Write a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return smooth random pixels (height, width, channels) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    layers = [Image.fromarray(small[..., i]).resize((width, height)) for i in range(channels)]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def encode_image(picture: np.ndarray | Image.Image, form: str, **options) -> bytes:
    """Return the file of a picture."""
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(path: Path, side: int = 50000) -> str:
    """Write a PNG of `side` x `side` pixels: its header, and almost nothing else."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", b"x\x9c\x00") + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return str(path)
