"""Pictures and clips: where their pixels come from, and how many of them the model sees.

The size of every picture and clip is decided here, once, from its header; the processor never
resizes again. Everything raises ValueError or OSError with a message for the user.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl import image_processing_qwen2_vl
from transformers.video_utils import VideoMetadata

from util.media.image import Remark, image_remarks, image_size, read_image
from util.media.source import FRAME_SIZE_KEYS, IMAGE_KEYS, NUM_FRAMES_KEYS, resolve
from util.media.video_reader import VideoReader

# Frames of a clip are read in multiples of this, and never fewer than MIN_FRAMES where the clip
# has them; a clip's frames share MAX_VIDEO_TOKENS * 0.9 tokens. A size given by an item itself
# stays between 4 and MAX_IMAGE_TOKENS tokens. Source: qwen-vl-utils 0.0.14, vision_process.py.
FRAME_FACTOR = 2
MIN_FRAMES = 4
MAX_VIDEO_TOKENS = 128000
MIN_FRAME_TOKENS = 128
MAX_IMAGE_TOKENS = 16384
MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the (height, width) nearest in shape that are multiples of `factor`, within limits.

    Raises ValueError where one side is over 200 times the other, or the limits make no sense.
    """
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels {min_pixels} is above max_pixels {max_pixels}")
    if min_pixels > MAX_IMAGE_TOKENS * factor**2:  # enlarging can take all memory there is
        most = MAX_IMAGE_TOKENS * factor**2
        raise ValueError(f"min_pixels {min_pixels} is above {most}, {MAX_IMAGE_TOKENS:,} tokens")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"{width} x {height} pixels: one side is over {MAX_ASPECT_RATIO} times the other"
        )
    return image_processing_qwen2_vl.smart_resize(height, width, factor, min_pixels, max_pixels)


@dataclass(frozen=True)
class PixelPolicy:
    """Decides the size of every picture and the frames of every clip.

    Limits are in pixels after resizing; an item's own keys go before them.
    """

    min_pixels: int
    max_pixels: int
    video_fps: float
    video_max_frames: int
    video_max_pixels: int
    patch_size: int  # side of a patch in pixels
    merge_size: int  # side of a token in patches
    temporal_patch_size: int  # its depth in frames
    allow_remote_media: bool = False  # whether http(s) URLs are fetched

    @property
    def factor(self) -> int:
        """Height and width are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @property
    def video_min_pixels(self) -> int:
        """Smallest frame: a sixth of the largest, as in qwen-vl-utils, and never above its own."""
        return min(MIN_FRAME_TOKENS * self.factor**2, self.video_max_pixels // 6)

    @property
    def video_total_pixels(self) -> int:
        """Largest clip, all frames together; two of them make one frame of tokens."""
        return FRAME_FACTOR * int(MAX_VIDEO_TOKENS * self.factor**2 * 0.9)

    def image_size(
        self, height: int, width: int, min_pixels=None, max_pixels=None, **resized
    ) -> tuple[int, int]:
        """Return the (height, width) to which a picture is resized; the rest are its own keys."""
        if resized:
            size, token = (resized["resized_height"], resized["resized_width"]), self.factor**2
            return smart_resize(*size, self.factor, 4 * token, MAX_IMAGE_TOKENS * token)
        # A default gives way to a limit of the item's own.
        smallest = min_pixels or min(self.min_pixels, max_pixels or self.min_pixels)
        largest = max_pixels or max(self.max_pixels, min_pixels or 0)
        return smart_resize(height, width, self.factor, smallest, largest)

    def num_frames(
        self, total_frames, rate, fps=None, nframes=None, min_frames=MIN_FRAMES, max_frames=None
    ) -> int:
        """Return how many of `total_frames` at `rate` frames a second to take of a clip.

        The rest are the item's own keys. Source: `smart_nframes` of qwen-vl-utils. A clip of a
        single frame, an error there, is shown twice. Raises ValueError where there are too few.
        """
        if nframes is not None:
            num_frames = round(nframes / FRAME_FACTOR) * FRAME_FACTOR
            if not FRAME_FACTOR <= num_frames <= max(total_frames, FRAME_FACTOR):
                raise ValueError(
                    f"nframes {nframes}: must be 2 to {total_frames}, the frames of the clip there"
                )
            return num_frames
        if total_frames < FRAME_FACTOR:
            return FRAME_FACTOR
        most = (max_frames or min(self.video_max_frames, total_frames)) // FRAME_FACTOR
        least = math.ceil(min_frames / FRAME_FACTOR) * FRAME_FACTOR
        wanted = max(total_frames / rate * (fps or self.video_fps), least)
        return int(min(wanted, max(most, 1) * FRAME_FACTOR, total_frames) // FRAME_FACTOR) * 2

    def frame_size(
        self,
        num_frames: int,
        height: int,
        width: int,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        **resized,
    ) -> tuple[int, int]:
        """Return the (height, width) to which each of `num_frames` frames is resized.

        The rest are the item's own keys. Source: `fetch_video` of qwen-vl-utils, and
        `Qwen2VLVideoProcessor.resize` with `cap_pixels_per_frame=True`.
        """
        if resized:
            return self.image_size(height, width, **resized)
        total_pixels = FRAME_FACTOR * total_pixels if total_pixels else self.video_total_pixels
        smallest = min_pixels or min(self.video_min_pixels, max_pixels or self.video_min_pixels)
        largest = min(self.video_max_pixels, total_pixels // num_frames)
        largest = max(largest, int(smallest * 1.05))
        largest = min(largest, max_pixels or largest)
        return smart_resize(height, width, self.factor, smallest, largest)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the (t, h, w) patch grid of resized frames; an image is one frame."""
        depth = -(-num_frames // self.temporal_patch_size)
        return depth, height // self.patch_size, width // self.patch_size

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


@dataclass(frozen=True)
class MediaShape:
    """What the model is told of a picture or clip beside its pixels."""

    grid: tuple[int, int, int]  # (t, h, w) in patches
    metadata: VideoMetadata | None = None  # of a clip: when its frames are shown
    remarks: Remark = Remark.NONE  # what is odd about it, where it was looked for


def image_sizes(item: dict, policy: PixelPolicy) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the (height, width) of a picture as it is shown, and as it is resized."""
    size = image_size(resolve(item["image"], policy.allow_remote_media))
    return size, policy.image_size(*size, **_keys(item, IMAGE_KEYS))


def probe_media(item: dict, policy: PixelPolicy) -> MediaShape:
    """Return the shape of an item, and what is odd about it.

    Headers and packets are read; of a clip one frame is decoded, which says how it is turned.
    """
    with _opened(item, policy, with_remarks=True) as (shape, _):
        return shape


def load_media(item: dict, policy: PixelPolicy) -> tuple[torch.Tensor, MediaShape]:
    """Return the patches (num_patches, patch_dim) uint8 of an item, and its shape."""
    with _opened(item, policy) as (shape, decode):
        return patchify(decode(), policy), shape


def load_frames(item: dict, policy: PixelPolicy) -> torch.Tensor:
    """Return an item as the model sees it: (num_frames, 3, height, width) uint8."""
    with _opened(item, policy) as (_, decode):
        return decode()


@contextmanager
def _opened(
    item: dict, policy: PixelPolicy, with_remarks: bool = False
) -> Iterator[tuple[MediaShape, Callable]]:
    """Yield the shape of an item, and a function that returns its frames, resized."""
    if item["type"] == "image":
        source = resolve(item["image"], policy.allow_remote_media)
        size = policy.image_size(*image_size(source), **_keys(item, IMAGE_KEYS))
        remarks = image_remarks(source) if with_remarks else Remark.NONE
        yield (
            MediaShape(policy.grid(1, *size), None, remarks),
            lambda: _resize(read_image(source), size),
        )
        return
    size_keys = _keys(item, FRAME_SIZE_KEYS)
    if isinstance(item["video"], list):
        sources = [resolve(source, policy.allow_remote_media) for source in item["video"]]
        sources += sources[-1:] * (-len(sources) % FRAME_FACTOR)  # the last twice if odd
        sizes = {image_size(source) for source in sources}
        if len(sizes) > 1:
            raise ValueError("the frames differ in size")
        size = policy.frame_size(len(sources), *sizes.pop(), **size_keys)
        grid, metadata = policy.grid(len(sources), *size), list_metadata(item, len(sources), policy)
        yield (
            MediaShape(grid, metadata),
            lambda: torch.cat([_resize(read_image(source), size) for source in sources]),
        )
        return
    with VideoReader(resolve(item["video"], policy.allow_remote_media)) as reader:
        indices = frame_indices(item, reader, policy)
        size = policy.frame_size(len(indices), *reader.size, **size_keys)
        grid, metadata = policy.grid(len(indices), *size), clip_metadata(item, reader, indices)
        remarks = Remark.HDR if reader.is_hdr else Remark.NONE
        yield MediaShape(grid, metadata, remarks), lambda: reader.get_frames_at(indices, *size)


def _keys(item: dict, names: tuple) -> dict:
    return {name: item[name] for name in names if name in item}


def _resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    # The same resampling, in the same integer arithmetic, as the model's own processor.
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)


def frame_indices(item: dict, reader: VideoReader, policy: PixelPolicy) -> list[int]:
    """Return which frames of a clip to take: evenly spread over its time, or the item's part of it.

    Source: `calculate_video_frame_range` of qwen-vl-utils and what its readers do with it, with
    the times of the frames in place of their numbers; on a constant rate both are the same. Where
    a frame stays longer than that, as in screen recordings, it is taken for as long as it stays.
    """
    seconds, inside = reader.seconds, _frames_inside(item, reader)
    num_frames = policy.num_frames(len(inside), reader.fps, **_keys(item, NUM_FRAMES_KEYS))
    times = np.linspace(seconds[inside[0]], seconds[inside[-1]], num_frames)
    # Rounded twice, as numbers half way between two frames carry the noise of floating point.
    nearest = np.interp(times, seconds[inside], inside).round(4).round().astype(int)
    # Half a millisecond more, as some containers round to milliseconds; gaps by two at most.
    on_screen = inside[np.searchsorted(seconds[inside], times + 5e-4, "right") - 1]
    return np.where(_stay(reader)[on_screen], on_screen, nearest).tolist()


def _stay(reader: VideoReader) -> np.ndarray:
    """Return whether each frame of a clip stays on screen for longer than a frame period."""
    gaps = np.diff(reader.seconds, append=reader.seconds[-1])
    period = gaps[:-1].min(initial=math.inf)
    return gaps > max(1.5 * period, period + 2e-3)


def _frames_inside(item: dict, reader: VideoReader) -> np.ndarray:
    """Return the indices of the frames in the part of a clip that the item takes."""
    start, end = item.get("video_start", 0), item.get("video_end", math.inf)
    seconds = reader.seconds
    inside = np.flatnonzero((seconds >= start - 1e-6) & (seconds <= end + 1e-6))
    if len(inside) == 0:
        raise ValueError(f"no frame from {start} to {end} s: the clip ends at {seconds[-1]:.3f} s")
    return inside


def clip_metadata(item: dict, reader: VideoReader, indices: list[int]) -> VideoMetadata:
    """Return when the frames `indices` of a clip are shown, as frame numbers at a constant rate.

    Times are numbers / fps, and the rate of the sampled frames is that of qwen-vl-utils. Where the
    rate of the clip varies, a frame gets the number that belongs to its time, a fraction; one that
    stays on screen, that of the time for which it was taken.
    """
    # Containers round times, at worst to milliseconds.
    own_numbers = np.arange(len(reader.seconds))
    is_constant = abs(reader.seconds - own_numbers / reader.fps) < 1e-3
    numbers = np.where(is_constant, own_numbers, reader.seconds * reader.fps)
    first, last = numbers[_frames_inside(item, reader)[[0, -1]]]
    taken_for = np.linspace(first, last, len(indices))
    taken = numbers[indices]
    taken = np.where(_stay(reader)[indices], np.maximum(taken, taken_for), taken)
    return VideoMetadata(float(last - first + 1), reader.fps, frames_indices=taken.tolist())


def list_metadata(item: dict, num_frames: int, policy: PixelPolicy) -> VideoMetadata:
    """Return when the frames of a list are shown, as frame numbers at a constant rate.

    By the item's `timestamps`, or `fps` of the item, or --video_fps.
    """
    if times := item.get("timestamps"):
        times = [*times, times[-1]][:num_frames]  # an odd list has its last frame twice
        spread = times[-1] - times[0]
        fps = (len(item["timestamps"]) - 1) / spread if spread else 1.0
        return VideoMetadata(num_frames, fps, frames_indices=[time * fps for time in times])
    fps = item.get("fps", policy.video_fps)
    return VideoMetadata(num_frames, fps, frames_indices=list(range(num_frames)))


def patchify(frames: torch.Tensor, policy: PixelPolicy) -> torch.Tensor:
    """Cut frames (num_frames, 3, height, width) into patches (num_patches, patch_dim).

    The order is that of Qwen2-VL: the patches of one token stand together, a patch is laid out
    as (channel, frame, row, column). A last odd frame is repeated, as an image is.
    """
    depth, patch, merge = policy.temporal_patch_size, policy.patch_size, policy.merge_size
    # A picture comes with its colours side by side, from where short rows are slow to copy.
    frames = frames.contiguous()
    if missing := -len(frames) % depth:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    grid_t, grid_h, grid_w = policy.grid(len(frames), *frames.shape[-2:])
    patches = frames.reshape(
        grid_t, depth, 3, grid_h // merge, merge, patch, grid_w // merge, merge, patch
    )
    return patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, policy.patch_dim)


def unpatchify(
    patches: torch.Tensor, grid: tuple[int, int, int], policy: PixelPolicy
) -> torch.Tensor:
    """Return the frames that `patchify` has cut: (grid_t * depth, 3, height, width)."""
    depth, patch, merge = policy.temporal_patch_size, policy.patch_size, policy.merge_size
    grid_t, grid_h, grid_w = grid
    frames = patches.reshape(
        grid_t, grid_h // merge, grid_w // merge, merge, merge, 3, depth, patch, patch
    )
    frames = frames.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return frames.reshape(grid_t * depth, 3, grid_h * patch, grid_w * patch)
