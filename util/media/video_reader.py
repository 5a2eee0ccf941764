"""Reads chosen frames of a video file, decoding and converting as little as it can."""

import bisect
import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation

from util.media.source import what_it_is

# Codecs in which decoding can begin at every packet that is marked as a key frame, and those of
# them whose decoders can be told to leave out frames that no other frame refers to. Both are
# checked frame by frame, for every container, in tests/media/test_video.py.
SEEKABLE_CODECS = {"h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg2video", "mjpeg"}
SKIPPING_CODECS = {"h264", "hevc", "mpeg2video"}
# FFmpeg's own decoders of these leave out what is transparent; libvpx's are slower.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# The nearest that swscale has to torchvision's antialiased bicubic: 52 dB on photographs.
INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# What FFmpeg may open, by the names of its demuxers: files of videos and animated pictures. It has
# hundreds more: some draw any text as a film (tty), or open what the file names (hls, concat).
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,"
    "ivf,ogg,asf,mxf,gxf,dv,rm,nut,wtv,yuv4mpegpipe,mjpeg,gif,apng,webp,jpegxl_anim,avif"
)
# PQ and HLG. Source: ITU-T H.273, transfer characteristics.
HDR_TRANSFERS = {16, 18}
MAX_FRAME_PIXELS = 8192 * 4352  # 8K; a decoder may hold 16 frames of up to 6 bytes a pixel
# Streams that are no video: covers, thumbnails, stills. Source: AV_DISPOSITION_* in avformat.h.
DEFAULT_STREAM, NO_VIDEO = 0x1, 0x400 | 0x800 | 0x100000


def declared_length(start: bytes) -> int | None:
    """Return how many bytes a file has at least, by its first bytes: Matroska, WebM and AVI.

    None where they do not say: other containers, and files that were written as a stream. Sources:
    RFC 8794 (EBML) and RFC 9559 (Matroska); the RIFF file format.
    """
    if start.startswith(b"RIFF"):
        length = int.from_bytes(start[4:8], "little")
        return length + 8 if 0 < length < 2**32 - 1 else None
    if not start.startswith(b"\x1a\x45\xdf\xa3"):
        return None
    length, begin = _ebml_length(start, 4)
    segment = begin + (length or 0)
    if not start.startswith(b"\x18\x53\x80\x67", segment):
        return None
    length, begin = _ebml_length(start, segment + 4)
    return None if length is None else begin + length


def _ebml_length(start: bytes, i: int) -> tuple[int | None, int]:
    """Return the length that stands at `i`, None where it is left open, and where it ends."""
    # The leading zeros of the first byte tell how many bytes it takes, each of 7 bits.
    width = 9 - int.from_bytes(start[i : i + 1], "big").bit_length()
    length, unknown = int.from_bytes(start[i : i + width], "big"), 2 ** (7 * width) - 1
    length &= unknown
    return None if length == unknown else length, i + width


def how_it_is_shown(frame: av.VideoFrame) -> tuple[int, bool]:
    """Return how many quarter turns to the left a frame is shown, and whether mirrored after that.

    Phones store it beside the frames, as a matrix. Source: libavutil/display.h.
    """
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    is_mirrored = a * d < b * c
    angle = math.degrees(math.atan2(b, -a if is_mirrored else a))
    return round(-angle / 90) % 4, is_mirrored


def over_white(frame: av.VideoFrame) -> av.VideoFrame:
    """Return a frame composed over white where it is transparent, as pictures are."""
    if not any(component.is_alpha for component in frame.format.components):
        return frame
    pixels = frame.reformat(format="rgba", interpolation=INTERPOLATION).to_ndarray()
    rgb, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:]
    if alpha.min() == 255:
        return frame
    rgb = (rgb * alpha + 255 * (255 - alpha.astype(np.uint16)) + 127) // 255
    return av.VideoFrame.from_ndarray(rgb.astype(np.uint8), "rgb24")


def choose_stream(streams: Sequence) -> av.VideoStream:
    """Return the video stream that is meant: the default one, of those that are not far smaller.

    Of several that are equal in this, the largest, then the first. Raises ValueError where all are
    covers or there is none.
    """
    videos = [s for s in streams if not s.disposition & NO_VIDEO]
    if not videos:
        raise ValueError("the file has no video stream")
    # A muxer marks its first stream as default, even where that is a thumbnail.
    largest = max(s.width * s.height for s in videos)
    large = [s for s in videos if s.width * s.height * 4 >= largest]
    return max(large, key=lambda s: (bool(s.disposition & DEFAULT_STREAM), s.width * s.height))


class VideoReader(contextlib.AbstractContextManager):
    """Gives the frames of a video at indices or times.

    `len(reader)` is the number of frames, `reader.seconds` (num_frames,) float64 when each is
    shown, counted from the first, `reader.fps` their average rate in 1/s, `reader.size` the
    (height, width) as shown, `reader.codec` the decoder's name, `reader.is_hdr` whether its colours
    are in HDR, which nothing here turns into those of a picture. `source` is the path of a file
    or a BytesIO; `num_threads` decode (0: as many as there are cores). Raises ValueError, or
    av.error.FFmpegError, where there is no video or it is damaged.

    A file that was cut off is told where its header or index says how long it was: mp4, mov, mkv,
    webm, avi, and of gif, which has an end. Of ts, mpg, flv, wmv, ogg, fragmented mp4 and
    recordings of live streams that is not known: cut off between two frames (fragments), they are
    read as shorter clips. Bytes damaged inside HEVC and VP9 can pass as wrong pixels: FFmpeg's
    decoders do not tell.
    """

    def __init__(self, source: str | BytesIO, num_threads: int = 1):
        if isinstance(source, str) and not Path(source).is_file():
            raise ValueError("not a file")  # a pipe or a device could block for ever
        self._source, self._num_threads, self._container = source, num_threads, None
        try:
            self._check_bytes()
            self._open()
            self._scan()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_):
        self.close()

    def __len__(self):
        return len(self._times)

    def close(self) -> None:
        """Close the file."""
        if self._container:
            self._container.close()

    def _open(self) -> None:
        """Open the file, or begin anew."""
        self.close()
        source = self._source
        if isinstance(source, BytesIO):
            source.seek(0)
        else:
            source = f"file:{source}"  # a name like a:b.mp4 is no URL
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        try:
            self._container = av.open(source, metadata_errors="ignore", options=options)
        except (av.error.ArgumentError, av.error.InvalidDataError) as error:
            if kind := what_it_is(self._start):
                raise ValueError(f"it is {kind}") from error
            raise ValueError(
                "it is no whole file of a format that is opened as video (mp4, mov, mkv, webm, "
                "avi, ts, mpg, flv, wmv, gif and the like): convert it to mp4"
            ) from error
        self._stream = choose_stream(self._container.streams.video)
        self._decoder, self.codec = self._stream.codec_context, self._stream.codec_context.name
        if self._stream.metadata.get("alpha_mode") == "1" and self.codec in ALPHA_DECODERS:
            self.codec = ALPHA_DECODERS[self.codec]
            self._decoder = av.CodecContext.create(self.codec, "r")
        width, height = self._stream.width, self._stream.height
        if width * height > MAX_FRAME_PIXELS:
            raise ValueError(
                f"frames of {width} x {height} pixels, over {MAX_FRAME_PIXELS:,}: resize the file"
            )
        self._decoder.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # headers can be wrong
        self._decoder.thread_count, self._decoder.thread_type = self._num_threads, "AUTO"

    def _check_bytes(self) -> None:
        """Raise ValueError where the bytes of the file say it was cut off."""
        source, is_open = self._source, isinstance(self._source, BytesIO)
        with contextlib.nullcontext(source) if is_open else open(source, "rb") as file:
            file.seek(0)
            self._start = start = file.read(256)
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - 64))
            end = file.read().rstrip(b"\0")
        declared = declared_length(start)
        if declared and length < declared:
            raise ValueError(f"the file is cut off: {length:,} of {declared:,} bytes")
        if start.startswith(b"GIF8") and not end.endswith(b";"):
            raise ValueError("the file is cut off: a GIF ends in a semicolon")

    def _scan(self) -> None:
        # Packets tell the presentation time of every frame, and where decoding can begin, without
        # decoding. Frame counts in headers are missing or wrong too often.
        packets, first, num_packets = [], None, 0
        for packet in self._container.demux(self._stream):
            if first is None:
                first = next(iter(self._decoder.decode(packet if packet.size else None)), None)
            num_packets += packet.dts is not None or packet.size > 0
            if packet.size:
                # The first byte of VP8 says whether a frame is shown (RFC 6386, section 9.1).
                is_hidden = self._stream.name == "vp8" and not memoryview(packet)[0] & 0x10
                is_hidden = packet.is_discard or is_hidden
                packets.append((packet.pts, packet.dts, packet.is_keyframe, is_hidden))
        if first is None or all(is_hidden for *_, is_hidden in packets):
            raise ValueError("no frame of the video can be decoded")
        if num_packets < len(self._stream.index_entries):
            raise ValueError(
                f"the file is cut off: {num_packets} of {len(self._stream.index_entries)} frames"
            )
        self._quarter_turns, self._is_mirrored = how_it_is_shown(first)
        self.is_hdr = first.color_trc in HDR_TRANSFERS
        # Pixels that are not square (DVD, HDV, old phones) are shown stretched.
        width = max(1, round(first.width * (self._stream.sample_aspect_ratio or 1)))
        self.size = (width, first.height) if self._quarter_turns % 2 else (first.height, width)
        self._set_times(packets, first.pts)

    def _set_times(self, packets: list[tuple], first_pts: int | None) -> None:
        """Set the times of all frames from packets: (pts, dts, is a key frame, is not shown)."""
        rate, time_base = self._stream.average_rate, self._stream.time_base
        decoding_times = [dts * time_base for _, dts, _, _ in packets if dts is not None]
        # Of recordings that were joined. Some muxers go back by a frame or two.
        restarts = any(a > b + 0.5 for a, b in itertools.pairwise(decoding_times))
        if first_pts is not None and not restarts:
            # A clip that was cut out begins with frames that refer to what is no longer there. In
            # Matroska these can be at negative times, which come as none.
            is_untimed_lost = "matroska" in self._container.format.name
            packets = [
                (pts, *rest, is_hidden or (is_untimed_lost if pts is None else pts < first_pts))
                for pts, *rest, is_hidden in packets
            ]
        shown = [pts for pts, _, _, is_hidden in packets if not is_hidden]
        # AVI has no presentation times: what comes as such is wrong where frames are reordered.
        reorders = self._container.format.name == "avi" and self._decoder.has_b_frames
        has_times = None not in shown and not reorders and not restarts
        if not has_times:
            shown, time_base = range(len(shown)), 1 / (rate or self._stream.guessed_rate or 1)
        shown = sorted(shown)
        # What a frame is found by: its time, or, where two have the same, its number.
        self._is_counted = not has_times or len(set(shown)) < len(shown)
        self._times = list(range(len(shown))) if self._is_counted else shown
        self.seconds = (np.array(shown) - shown[0]) * float(time_base)
        last = self.seconds[-1]
        measured = (len(shown) - 1) / last if last > 0 else float(rate or 1)
        # Times may be rounded to milliseconds; the header has the exact rate, if it is right.
        is_right = rate and abs(float(rate) / measured - 1) < 0.01
        self.fps = float(rate) if is_right else measured
        # Of packets, by presentation time: the number in decoding order, and of key frames the dts.
        self._numbers = {pts: i for i, (pts, *_) in enumerate(packets)}
        keys = {pts: dts for pts, dts, is_key, _ in packets if is_key and pts is not None}
        self._key_dts, self._key_times = keys, sorted(keys)

    def index_at(self, seconds: float) -> int:
        """Return the index of the frame that is shown at a time, counted from the first frame."""
        # Half a millisecond more, as some containers round to milliseconds.
        return max(0, bisect.bisect_right(self.seconds, seconds + 5e-4) - 1)

    def get_frames_at(
        self, wanted: list, height: int | None = None, width: int | None = None
    ) -> torch.Tensor:
        """Return the wanted frames as (num_frames, 3, height, width) uint8 RGB, upright.

        `wanted`: indices (int), or times in seconds from the first frame (float), in any order.
        Height and width left out: as shown. Raises ValueError where a frame cannot be decoded.
        """
        if height is None or width is None:
            height, width = self.size
        rows = {}  # time of a frame: where it goes
        for row, i in enumerate(wanted):
            i = self.index_at(i) if isinstance(i, float) else range(len(self))[i]
            rows.setdefault(self._times[i], []).append(row)
        frames = np.empty((len(wanted), 3, height, width), np.uint8)
        # What decoding from key frames does not yield (a key frame that is none, as with intra
        # refresh), decoding everything does, or the file is damaged.
        for decode in (self._decode_sparsely, self._decode_from_the_start):
            with contextlib.suppress(av.error.InvalidDataError, av.error.ArgumentError):
                for time, frame in decode(sorted(rows)):
                    planes = self._to_rgb(frame, height, width)
                    for channel, plane in enumerate(planes):
                        frames[rows[time], channel] = plane
                    del rows[time]
            if not rows:
                return torch.from_numpy(frames)
        index = bisect.bisect_left(self._times, min(rows))
        raise ValueError(
            f"the frame at {self.seconds[index]:.3f} s cannot be decoded: the file is damaged"
        )

    def _decode_sparsely(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (time, frame) of the wanted times, ascending, from the nearest key frames on."""
        if self._is_counted or not self._key_times or self.codec not in SEEKABLE_CODECS:
            return
        can_skip = self.codec in SKIPPING_CODECS
        for key_time, times in self._groups(wanted):
            missing, last = set(times), max(self._numbers[time] for time in times)
            for packet in self._packets_from(key_time):
                skips = can_skip and packet.pts not in missing
                self._decoder.skip_frame = "NONREF" if skips else "DEFAULT"
                frames = self._decoder.decode(packet if packet.size else None)
                # All that is wanted has gone in: draining gets it out without decoding more.
                is_last = self._numbers.get(packet.pts, -1) >= last
                if is_last and packet.size:
                    frames += self._decoder.decode(None)
                for frame in frames:
                    if frame.pts in missing and not frame.is_corrupt:
                        missing.remove(frame.pts)
                        yield frame.pts, frame
                if is_last:
                    break

    def _groups(self, wanted: list[int]) -> list[tuple[int, list[int]]]:
        """Return (time of a key frame, wanted times to decode from it on) in order."""
        groups, last = [], -1
        for time in wanted:
            # A frame that is shown before a key frame is never decoded from it, even if it follows
            # it in the file: it may refer to the frames before.
            key_time = self._key_times[max(0, bisect.bisect_right(self._key_times, time) - 1)]
            if self._numbers[key_time] > last:
                groups.append((key_time, []))
            groups[-1][1].append(time)
            last = max(last, self._numbers[time])
        return groups

    def _packets_from(self, key_time: int) -> Iterator[av.Packet]:
        """Go to a key frame, or to one before it where the container finds no better."""
        # Some containers are sought in by pts, some by dts; either may land behind.
        for target in (key_time, self._key_dts[key_time], self._key_times[0]):
            if target is not None:
                self._container.seek(target, stream=self._stream)
                packets = self._container.demux(self._stream)
                first = next((p for p in packets if p.is_keyframe), None)
                if first is not None and first.pts is not None and first.pts <= key_time:
                    return itertools.chain([first], packets)
        return iter(())

    def _decode_from_the_start(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (time, frame) of the wanted times, ascending, decoding everything before them."""
        self._open()
        missing = set(wanted)
        packets = self._container.demux(self._stream)
        frames = (f for p in packets for f in self._decoder.decode(p if p.size else None))
        for i, frame in enumerate(frames):
            time = i if self._is_counted else frame.pts
            if time in missing and not frame.is_corrupt:
                missing.remove(time)
                yield time, frame
            if not missing:
                return

    def _to_rgb(self, frame: av.VideoFrame, height: int, width: int) -> list[np.ndarray]:
        # swscale converts and shrinks in one pass; the full-size RGB picture never exists. Planes
        # take it a third of the time of rgb24, and are the same but for a rare rounding.
        if self._quarter_turns % 2:
            height, width = width, height
        threads, frame = self._num_threads, over_white(frame)
        gbr = frame.reformat(width, height, "gbrp", interpolation=INTERPOLATION, threads=threads)
        planes = (
            np.frombuffer(plane, np.uint8).reshape(height, -1)[:, :width] for plane in gbr.planes
        )
        green, blue, red = (np.rot90(plane, self._quarter_turns) for plane in planes)
        return [p[:, ::-1] if self._is_mirrored else p for p in (red, green, blue)]
