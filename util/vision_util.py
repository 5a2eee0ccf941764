"""Pictures and clips: where their pixels come from, and how many of them the model sees.

The size of every picture and clip is decided here, once, from its header; the processor never
resizes again. Everything raises ValueError or OSError with a message for the user.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

# Frames of a clip are read in multiples of this, and never fewer than MIN_FRAMES where the clip
# has them; a clip's frames share MAX_VIDEO_TOKENS * 0.9 tokens. Source: qwen-vl-utils 0.0.14,
# vision_process.py.
FRAME_FACTOR = 2
MIN_FRAMES = 4
MAX_VIDEO_TOKENS = 128000
MIN_FRAME_PIXELS = 128 * 28 * 28


MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the (height, width) nearest in shape that are multiples of `factor`, within limits.

    Source: `smart_resize` in transformers' image_processing_qwen2_vl.py. Raises ValueError where
    one side is over 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"{width} x {height} pixels: longer than {MAX_ASPECT_RATIO} times its width"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class PixelPolicy:
    """Decides the size of every picture and the frames of every clip.

    Limits are in pixels after resizing. `patch_size` is the side of a patch in pixels,
    `merge_size` the side of a token in patches, `temporal_patch_size` its depth in frames.
    """

    min_pixels: int
    max_pixels: int
    video_fps: float
    video_max_frames: int
    video_max_pixels: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int

    @property
    def factor(self) -> int:
        """Height and width are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @property
    def video_min_pixels(self) -> int:
        """Smallest frame: a sixth of the largest, as in qwen-vl-utils, and never above its own."""
        return min(MIN_FRAME_PIXELS, self.video_max_pixels // 6)

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which a picture is resized."""
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)

    def num_frames(self, total_frames: int, fps: float) -> int:
        """Return how many frames to take of a clip with `total_frames` at `fps`.

        Source: `smart_nframes` of qwen-vl-utils. A clip of a single frame, an error there, is
        shown twice.
        """
        if total_frames < FRAME_FACTOR:
            return FRAME_FACTOR
        most = min(self.video_max_frames, total_frames) // FRAME_FACTOR * FRAME_FACTOR
        wanted = min(max(total_frames / fps * self.video_fps, MIN_FRAMES), max(most, FRAME_FACTOR))
        return int(min(wanted, total_frames) // FRAME_FACTOR) * FRAME_FACTOR

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which each of `num_frames` frames is resized.

        Source: `fetch_video` of qwen-vl-utils, and `Qwen2VLVideoProcessor.resize` with
        `cap_pixels_per_frame=True`.
        """
        total_pixels = int(MAX_VIDEO_TOKENS * self.factor**2 * 0.9)
        max_pixels = min(self.video_max_pixels, total_pixels * FRAME_FACTOR // num_frames)
        max_pixels = max(max_pixels, int(self.video_min_pixels * 1.05))
        return smart_resize(height, width, self.factor, self.video_min_pixels, max_pixels)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the (t, h, w) patch grid of resized frames; an image is one frame."""
        return (
            -(-num_frames // self.temporal_patch_size),
            height // self.patch_size,
            width // self.patch_size,
        )

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Return how many tokens the language model sees for a patch grid."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    @property
    def dummy_grid(self) -> tuple[int, int, int]:
        """The patch grid of the smallest picture, which is one token."""
        return self.grid(1, self.factor, self.factor)

    @property
    def patch_dim(self) -> int:
        """Values in one patch: channels * frames * height * width."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def probe_media(item: dict, policy: PixelPolicy) -> tuple[int, int, int]:
    """Return the (t, h, w) patch grid of a picture or clip without decoding it.

    `item` is a content item whose "image" or "video" is a local path.
    """
    if item["type"] == "image":
        return policy.grid(1, *policy.image_size(*image_size(item["image"])))
    with VideoReader(item["video"]) as reader:
        num_frames = policy.num_frames(len(reader), reader.fps)
        return policy.grid(num_frames, *policy.frame_size(num_frames, *reader.size))


def load_media(item: dict, policy: PixelPolicy) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Return the patches (num_patches, patch_dim) uint8 of a picture or clip, and its grid."""
    frames = load_frames(item, policy)
    return patchify(frames, policy), policy.grid(len(frames), *frames.shape[-2:])


def load_frames(item: dict, policy: PixelPolicy) -> torch.Tensor:
    """Return a picture or clip as the model sees it: (num_frames, 3, height, width) uint8."""
    if item["type"] == "image":
        image = read_image(item["image"])
        size = policy.image_size(*image.shape[-2:])
        # The same resampling, in the same integer arithmetic, as the model's own processor.
        return F.interpolate(image[None], size, mode="bicubic", antialias=True)
    with VideoReader(item["video"]) as reader:
        num_frames = policy.num_frames(len(reader), reader.fps)
        indices = np.linspace(0, len(reader) - 1, num_frames).round().astype(int)
        return reader.get_frames_at(indices.tolist(), *policy.frame_size(num_frames, *reader.size))


def patchify(frames: torch.Tensor, policy: PixelPolicy) -> torch.Tensor:
    """Cut frames (num_frames, 3, height, width) into patches (num_patches, patch_dim).

    The order is that of Qwen2-VL: the patches of one token stand together, a patch is laid out
    as (channel, frame, row, column). A last odd frame is repeated, as an image is.
    """
    depth, patch, merge = policy.temporal_patch_size, policy.patch_size, policy.merge_size
    if missing := -len(frames) % depth:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    grid_t, grid_h, grid_w = policy.grid(len(frames), *frames.shape[-2:])
    patches = frames.reshape(
        grid_t, depth, 3, grid_h // merge, merge, patch, grid_w // merge, merge, patch
    )
    return patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, policy.patch_dim)


def open_image(path: str) -> Image.Image:
    """Open a picture; only its header is read."""
    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the picture is too large to open safely: {error}") from error


def image_size(path: str) -> tuple[int, int]:
    """Return the (height, width) of a picture as it is shown, from its header."""
    with open_image(path) as image:
        width, height = image.size
        # Orientations 5 to 8 of the EXIF standard turn the picture by a quarter.
        return (width, height) if _orientation(image) >= 5 else (height, width)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened picture, 1 to 8, from its header."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif() would decode the whole picture to look behind it
    orientation = image.getexif().get(0x0112, 1)
    return orientation if orientation in range(1, 9) else 1


def read_image(path: str) -> torch.Tensor:
    """Decode a picture to (3, height, width) uint8 RGB, upright, alpha over white."""
    with open_image(path) as image:
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert("RGB") would clip 16 bits instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


class VideoReader:
    """Reads chosen frames of a video file, decoding as little as it can.

    `len(reader)` is the number of frames, `reader.fps` their average rate in 1/s, `reader.size`
    the (height, width) as shown. Raises ValueError where the file holds no video.
    """

    def __init__(self, path: str):
        if not Path(path).is_file():
            raise ValueError("not a file")
        self._container = av.open(path, metadata_errors="ignore")
        try:
            self._read_header()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._container.close()

    def __len__(self):
        return len(self._times)

    def _read_header(self):
        streams = [s for s in self._container.streams.video if not s.disposition & 1024]
        if not streams:
            raise ValueError("the file has no video stream")
        self._stream = streams[0]
        # One thread decodes: the workers are the parallelism.
        self._stream.codec_context.thread_count = 1
        # Packets tell the presentation time of every frame, and which of them can be jumped to,
        # without decoding one. Frame counts in headers are missing or wrong too often.
        packets = [p for p in self._container.demux(self._stream) if p.size and not p.is_discard]
        times = [p.pts if p.pts is not None else p.dts for p in packets]
        if not packets or None in times:
            raise ValueError("the video has no frames with presentation times")
        self._times = sorted(times)
        self._key_times = sorted(t for t, p in zip(times, packets) if p.is_keyframe)
        seconds = float((self._times[-1] - self._times[0]) * self._stream.time_base)
        rate = self._stream.average_rate
        self.fps = (len(times) - 1) / seconds if seconds > 0 else float(rate or 1)
        self._container.seek(self._times[0], stream=self._stream)
        first = next(self._container.decode(self._stream), None)
        if first is None:
            raise ValueError("no frame of the video can be decoded")
        # Phones store how the picture is turned beside the frames, in degrees to the left.
        self._quarter_turns = round(first.rotation / 90) % 4
        turned = self._quarter_turns % 2
        self.size = (first.width, first.height) if turned else (first.height, first.width)

    def get_frames_at(self, indices: list[int], height: int, width: int) -> torch.Tensor:
        """Return the frames at `indices` (ascending) as (num_frames, 3, height, width) uint8."""
        wanted = [self._times[i] for i in indices]
        frames = np.empty((len(wanted), height, width, 3), np.uint8)
        done, last_time = 0, None
        while done < len(wanted):
            key_time = max((t for t in self._key_times if t <= wanted[done]), default=None)
            self._container.seek(key_time or self._times[0], stream=self._stream)
            before = done
            for frame in self._container.decode(self._stream):
                while done < len(wanted) and frame.pts == wanted[done]:
                    if wanted[done] != last_time:
                        picture = self._to_rgb(frame, height, width)
                    frames[done] = picture
                    last_time = wanted[done]
                    done += 1
                if done == len(wanted):
                    break
            if done == before:
                raise ValueError(
                    f"the frame at {float(wanted[done] * self._stream.time_base):.3f} s cannot be "
                    "decoded: the file is damaged"
                )
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def _to_rgb(self, frame, height: int, width: int) -> np.ndarray:
        # swscale converts and shrinks in one pass; the full-size RGB picture never exists.
        if self._quarter_turns % 2:
            height, width = width, height
        rgb = frame.reformat(width, height, "rgb24", interpolation="BICUBIC", threads=1)
        return np.rot90(rgb.to_ndarray(), self._quarter_turns)


def check_local_file(path: str) -> None:
    """Raise ValueError where `path` is not a readable, non-empty, regular file."""
    if os.path.isdir(path):
        raise ValueError("is a folder, not a file")
    if not os.path.isfile(path):  # also true of devices and pipes, which could block for ever
        raise ValueError("is not a regular file")
    if os.path.getsize(path) == 0:
        raise ValueError("is empty")
