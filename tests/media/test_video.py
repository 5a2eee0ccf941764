"""The video reader shows the frames that a full decode shows, at their times, sparsely."""

import dataclasses
import io
import json
import operator
import os
import random
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type as SideData

import zoo
from helpers import POLICY, REPO, hwc, psnr, video
from util.media import video_reader
from util.media.image import read_image
from util.media.source import resolve
from util.media.video_reader import VideoReader, how_it_is_shown
from util.vision_util import clip_metadata, frame_indices, load_frames, load_media, probe_media

PHOTOS = sorted([*REPO.glob("train_data/*.jpg"), *REPO.glob("test_data/*.jpg")])


def full_decode(path: str) -> list[av.VideoFrame]:
    """Return every frame that a plain decoder shows, in order."""
    with av.open(path) as container:
        return list(container.decode(video=0))


def to_rgb(frame: av.VideoFrame, size: tuple[int, int], turns: int = 0) -> torch.Tensor:
    height, width = size[::-1] if turns % 2 else size
    rgb = frame.reformat(width, height, "rgb24", interpolation=video_reader.INTERPOLATION)
    return torch.from_numpy(np.rot90(rgb.to_ndarray(), turns).copy()).permute(2, 0, 1)


def assert_reads_as_full_decode(path: str, num_frames: int, turns: int = 0) -> None:
    """Frames and times: any frames, on one and on two decoder threads, in any order, some twice."""
    decoded, chance = full_decode(path), random.Random(path)
    for num_threads in (1, 2):
        with VideoReader(path, num_threads) as reader:
            assert len(reader) == len(decoded) == num_frames
            expected = [to_rgb(frame, reader.size, turns) for frame in decoded]
            assert len({frame.numpy().tobytes() for frame in expected}) == num_frames
            drawn = (chance.choices(range(num_frames), k=count) for count in (1, 2, 5))
            for indices in ([0], [num_frames - 1], *drawn, list(range(num_frames))):
                frames = reader.get_frames_at(indices)
                assert all(torch.equal(expected[i], f) for i, f in zip(indices, frames)), indices
    if not path.endswith("h264.avi"):  # it tells no order of its frames
        seconds = [float((f.pts - decoded[0].pts) * f.time_base) for f in decoded]
        assert reader.seconds == pytest.approx(seconds, abs=2e-3)


@pytest.mark.parametrize("name", zoo.CLIPS)
def test_frames_equal_those_of_a_full_decode(clips, name):
    num_frames = zoo.CLIPS[name][2].get("num_frames", zoo.NUM_FRAMES)
    turns = 1 if name == "rotated.mp4" else 0
    assert_reads_as_full_decode(zoo.make_zoo_clip(clips, name), num_frames, turns)


def test_every_codec_that_can_be_decoded_sparsely_is(clips, monkeypatch):
    """The frames come from the nearest key frames; only what no key frame leads to falls back."""

    def refuse(self, wanted):
        raise AssertionError("decodes everything")

    monkeypatch.setattr(VideoReader, "_decode_from_the_start", refuse)
    for name, (codec, *_) in zoo.CLIPS.items():
        if codec in ("mpeg4", "wmv2", "prores_ks", "gif") or name in (
            *("h264.avi", "intra_refresh.mkv"),
        ):
            continue
        with VideoReader(zoo.make_zoo_clip(clips, name)) as reader:
            reader.get_frames_at([len(reader) - 1, len(reader) // 2], 28, 28)


class Counter:
    """Stands in for a decoder and counts the frames that leave it."""

    def __init__(self, decoder):
        object.__setattr__(self, "decoder", decoder)
        object.__setattr__(self, "frames", [])

    def __setattr__(self, name, value):
        setattr(self.decoder, name, value)

    def decode(self, packet):
        frames = self.decoder.decode(packet)
        self.frames.extend(frames)
        return frames


def count_decoded(reader, indices) -> int:
    """Return how many frames leave the decoder for the frames at `indices`."""
    decoder = reader._decoder
    reader._decoder = counter = Counter(decoder)
    reader.get_frames_at(indices, 28, 28)
    reader._decoder = decoder
    return len(counter.frames)


def test_nothing_is_decoded_that_is_not_needed(clips, tmp_path):
    codec = ("libx264", {"x264-params": "keyint=20:min-keyint=20:scenecut=0:bframes=3:b-adapt=0"})
    path = zoo.make_clip(tmp_path / "a.mp4", *codec, num_frames=200)
    with VideoReader(path, num_threads=1) as reader:
        assert count_decoded(reader, [0]) == 1
        assert count_decoded(reader, [20]) == 1
        # From the start of the group on, and without the frames that nothing refers to.
        assert count_decoded(reader, [199]) <= 12
        assert count_decoded(reader, [5, 195]) <= 16
        assert count_decoded(reader, list(range(0, 200, 20))) == 10
        assert count_decoded(reader, list(range(200))) == 200


def test_only_the_frames_that_are_kept_are_converted(clips):
    convert = mock.patch.object(VideoReader, "_to_rgb", autospec=True, wraps=VideoReader._to_rgb)
    with convert as calls, VideoReader(zoo.make_zoo_clip(clips, "one_group.mp4")) as reader:
        reader.get_frames_at([3, 30, 30], 56, 84)
    assert [call.args[2:] for call in calls.call_args_list] == [(56, 84)] * 2


def test_frames_are_found_by_their_times(clips):
    with VideoReader(zoo.make_zoo_clip(clips, "variable_rate.mp4")) as reader:
        seconds = reader.seconds.tolist()
        assert reader.index_at(seconds[7]) == 7
        assert reader.index_at((seconds[7] + seconds[8]) / 2) == 7
        assert reader.index_at(-1.0) == 0 and reader.index_at(10**6) == len(reader) - 1
        at_times = reader.get_frames_at([seconds[7], seconds[20]], 28, 28)
        assert torch.equal(at_times, reader.get_frames_at([7, 20], 28, 28))
        # Evenly spread over time, not over numbers of frames; where a frame stays for longer than
        # the 1/25 s of a frame, none from the future.
        indices = frame_indices({"nframes": 6}, reader, POLICY)
        wanted = np.linspace(0, seconds[-1], 6)
        assert indices != np.linspace(0, len(reader) - 1, 6).round().tolist()
        for i, time in zip(indices, wanted):
            short = i == len(reader) - 1 or seconds[i] - seconds[i - 1] < 0.05
            assert i == reader.index_at(time) or (short and abs(seconds[i] - time) <= 0.02)


@pytest.mark.parametrize(
    "milliseconds", [(0, 40, 80, 9_000, 9_040), (0, 33, 67, 100, 5_100, 5_133)]
)
def test_a_frame_that_stays_is_taken_for_as_long_as_it_stays(milliseconds):
    seconds = np.array(milliseconds) / 1000
    last = len(seconds) - 1
    reader = SimpleNamespace(seconds=seconds, fps=last / seconds[-1])
    long = int(np.diff(seconds).argmax())
    indices = frame_indices({"nframes": 4}, reader, POLICY)
    assert indices == [0, long, long, last]
    # The model is told the times for which it is taken, not twice that when it came.
    told = clip_metadata({}, reader, indices).timestamps
    assert told == pytest.approx(np.linspace(0, seconds[-1], 4), abs=1e-3)
    # A constant rate, rounded to milliseconds, keeps the nearest frame, as qwen-vl-utils does.
    for rate in (0.5, 24000 / 1001, 25, 30, 60, 240):
        even = SimpleNamespace(seconds=(np.arange(100) / rate).round(3), fps=rate)
        times = np.linspace(0, even.seconds[-1], 36)
        nearest = np.interp(times, even.seconds, range(100)).round(4).round()
        assert frame_indices({"nframes": 36}, even, POLICY) == nearest.tolist(), rate


def test_transparent_clips_are_composed_over_white(tmp_path):
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[..., 0], pixels[:24, :, 3], pixels[24:, 32:, 3] = 200, 255, 128
    kinds = [("a.mov", "qtrle", "argb"), ("a.apng", "apng", "rgba"), ("b.mkv", "ffv1", "yuva444p")]
    kinds += [("c.mov", "prores_ks", "yuva444p10le"), ("d.webm", "libvpx-vp9", "yuva420p")]
    kinds.append(("e.webm", "libvpx", "yuva420p"))
    size = {"num_frames": 2, "height": 48, "width": 64}
    for name, codec, pix_fmt in kinds:
        options = {"auto-alt-ref": "0"} if name.endswith("webm") else {}
        more = size | {"pix_fmt": pix_fmt, "picture": pixels}
        zoo.make_clip(tmp_path / name, codec, options, **more)
        with VideoReader(str(tmp_path / name)) as reader:
            got = hwc(reader.get_frames_at([1])[0]).astype(int)
        for where, expected in {
            (10, 32): (200, 0, 0),
            (40, 10): (255, 255, 255),
            (40, 54): (227, 127, 127),
        }.items():
            assert np.abs(got[where] - expected).max() <= 6, (name, where, got[where])


@pytest.mark.parametrize("rotation, size", [(0, (96, 192)), (90, (192, 96))])
def test_pixels_that_are_not_square_are_shown_stretched(tmp_path, rotation, size):
    shape = {"num_frames": 2, "rotation": rotation, "aspect": Fraction(4, 3)}
    path = zoo.make_clip(tmp_path / "a.mp4", "libx264", {}, **shape)
    with VideoReader(path) as reader:
        assert reader.size == size == reader.get_frames_at([0]).shape[-2:]
        policy = dataclasses.replace(POLICY, video_max_pixels=10**6)
        _, h, w = probe_media(video(path), policy).grid
        assert (h > w) == (rotation == 90) and max(h, w) / min(h, w) == pytest.approx(2, rel=0.1)


def test_the_stream_that_is_meant_is_read(tmp_path):
    path = str(tmp_path / "a.mkv")
    with av.open(path, "w") as container:
        streams = []
        for width in (40, 160, 144):
            streams.append(container.add_stream("libx264", rate=25))
            streams[-1].width, streams[-1].height, streams[-1].pix_fmt = width, 96, "yuv420p"
        for stream in streams:
            pixels = zoo.clip_frame(0, 96, stream.width)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    # A thumbnail comes first.
    with VideoReader(path) as reader:
        assert reader.size == (96, 160) and len(reader) == 1

    def stream(width, disposition):
        return SimpleNamespace(width=width, height=100, disposition=disposition)

    default, cover, timed, still = 0x1, 0x400, 0x800, 0x100000
    small, large = stream(100, default), stream(150, 0)
    assert video_reader.choose_stream([large, small]) is small
    assert video_reader.choose_stream([stream(20, default), large]) is large
    others = [stream(900, kind | default) for kind in (cover, timed, still)]
    assert video_reader.choose_stream([*others, small]) is small
    with pytest.raises(ValueError, match="the file has no video stream"):
        video_reader.choose_stream(others)


def test_frames_are_numbered_as_at_a_constant_rate(clips):
    """number / fps is the time of a frame: exact numbers at a constant rate, else fractions."""
    for name in ("h264.mp4", "h264.mkv", "h264.ts", "h264.avi", "late_start.mp4", "vp9.webm"):
        with VideoReader(zoo.make_zoo_clip(clips, name)) as reader:
            got = clip_metadata({"video_start": 0.39, "video_end": 0.81}, reader, [10, 20])
            assert (got.frames_indices, got.fps, got.total_num_frames) == ([10, 20], 25, 11), name
            assert reader.fps == zoo.CLIP_RATE and len(reader) == zoo.NUM_FRAMES, name
            assert reader.seconds == pytest.approx(np.arange(40) / 25, abs=6e-4)
    with VideoReader(zoo.make_zoo_clip(clips, "variable_rate.mp4")) as reader:
        indices = frame_indices({"nframes": 4}, reader, POLICY)
        got = clip_metadata({}, reader, indices)
        wanted = np.linspace(0, reader.seconds[-1], 4)
        stay = np.diff(reader.seconds, append=reader.seconds[-1])[indices] > 0.06
        assert stay.any() and not stay.all()
        expected = np.where(stay, wanted, reader.seconds[indices])
        assert got.timestamps == pytest.approx(expected, abs=1e-3)
        assert got.sampled_fps == pytest.approx(4 / (reader.seconds[-1] + 1 / reader.fps))


def test_a_clip_of_one_frame_is_a_pair(clips):
    with VideoReader(zoo.make_zoo_clip(clips, "one_frame.mp4")) as reader:
        assert frame_indices({}, reader, POLICY) == [0, 0]


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotated_clips_are_shown_upright(tmp_path, rotation):
    path = zoo.make_clip(tmp_path / "a.mp4", "libx264", {}, num_frames=2, rotation=rotation)
    with VideoReader(path) as reader:
        upright = np.rot90(zoo.clip_frame(0, 96, 144), rotation // 90)
        assert reader.size == upright.shape[:2]
        assert psnr(hwc(reader.get_frames_at([0])[0]), upright) > 25
        small = reader.get_frames_at([0], 56, 84)
        assert small.shape == (1, 3, 56, 84)


def test_mirrored_clips_are_shown_mirrored(tmp_path):
    path = tmp_path / "a.mp4"
    zoo.make_clip(path, "libx264", {}, num_frames=2)
    with VideoReader(zoo.mirror(path)) as reader:
        expected = zoo.clip_frame(0, 96, 144)[:, ::-1]
        assert psnr(hwc(reader.get_frames_at([0])[0]), expected) > 25
    matrix = {
        "rotated left, then mirrored": ([0, -1, 0, -1, 0], (1, True)),
        "upside down": ([1, 0, 0, 0, -1], (2, True)),
        "rotated right": ([0, 1, 0, -1, 0], (3, False)),
    }
    for name, (values, expected) in matrix.items():
        numbers = np.zeros(9, np.int32)
        numbers[:5] = np.array(values) << 16
        frame = SimpleNamespace(side_data={SideData.DISPLAYMATRIX: numbers.tobytes()})
        assert how_it_is_shown(frame) == expected, name


def test_an_edit_list_hides_frames(clips, tmp_path):
    source, cut = zoo.make_zoo_clip(clips, "h264.mov"), Fraction(17, zoo.CLIP_RATE)
    path = zoo.copy_packets(source, tmp_path / "a.mp4", zoo.earlier, cut)
    assert_reads_as_full_decode(path, zoo.NUM_FRAMES - 17)
    # The hidden frames are those before the cut.
    with VideoReader(path) as reader:
        assert psnr(hwc(reader.get_frames_at([0])[0]), zoo.clip_frame(17, 96, 144)) > 25


@pytest.mark.parametrize("name", ["h264.ts", "hevc_open_gop.ts", "mpeg2.ts"])
def test_clips_that_begin_between_key_frames(clips, tmp_path, name):
    """As recordings do, and what was cut out of a clip without decoding it."""
    source = zoo.make_zoo_clip(clips, name)
    for start in (3, 12, 17):
        change = operator.itemgetter(slice(start, None))
        path = zoo.copy_packets(source, tmp_path / name, change)
        assert_reads_as_full_decode(path, len(full_decode(path)))
        assert probe_media(video(path), POLICY) == load_media(video(path), POLICY)[1]


def test_clips_whose_first_frames_refer_to_none(clips, tmp_path):
    """An open group of pictures, cut before its key frame: mkv gives negative times as none."""

    def from_the_second_key_frame(packets):
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        packets = packets[keys[1] :]
        return zoo.earlier(packets, packets[0].pts * packets[0].time_base)

    source = zoo.make_zoo_clip(clips, "hevc_open_gop.ts")
    path = zoo.copy_packets(source, tmp_path / "a.mkv", from_the_second_key_frame)
    assert_reads_as_full_decode(path, len(full_decode(path)))


def test_frames_that_are_never_shown_are_no_frames(clips, tmp_path):
    source = zoo.make_zoo_clip(clips, "vp8.webm")
    path = zoo.copy_packets(source, tmp_path / "a.webm", zoo.with_unshown, 17)
    assert_reads_as_full_decode(path, zoo.NUM_FRAMES)


def test_frames_at_the_same_time_do_not_change_the_times_of_others(tmp_path):
    options = {"g": "12", "bf": "0"}
    source = zoo.make_clip(tmp_path / "a.mkv", "libx264", options, ticks="variable")
    assert_reads_as_full_decode(source, zoo.NUM_FRAMES)
    path = zoo.copy_packets(source, tmp_path / "b.mkv", zoo.with_equal_times, 20)
    with VideoReader(source) as whole, VideoReader(path) as reader:
        assert len(reader) == zoo.NUM_FRAMES and reader.seconds[20] == reader.seconds[19]
        others = [i for i in range(zoo.NUM_FRAMES) if i != 20]
        assert np.array_equal(reader.seconds[others], whole.seconds[others])
        every = range(zoo.NUM_FRAMES)
        assert torch.equal(reader.get_frames_at(every), whole.get_frames_at(every))


def test_a_list_of_frames_is_a_clip():
    frames = [zoo.smooth(70, 90, seed=i) for i in range(5)]
    pictures = [zoo.encode_image(frame, "PNG") for frame in frames]
    got = load_frames(video(pictures), POLICY)
    assert len(got) == 6 and torch.equal(got[4], got[5])
    assert probe_media(video(pictures), POLICY).grid == POLICY.grid(6, *got.shape[-2:])
    size = POLICY.frame_size(6, 70, 90)
    for frame, pixels in zip(got, frames):
        one = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        assert torch.equal(frame, F.interpolate(one, size, mode="bicubic", antialias=True)[0])
    pictures[2] = zoo.encode_image(zoo.smooth(70, 91), "PNG")
    with pytest.raises(ValueError, match="differ in size"):
        probe_media(video(pictures), POLICY)


def test_downsizing_is_near_antialiased_bicubic():
    values = []
    for photo in PHOTOS:
        pixels = hwc(read_image(str(photo)))
        height, width = (side // 2 * 2 for side in pixels.shape[:2])
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), "rgb24")
        frame = frame.reformat(format="yuv420p", interpolation=video_reader.INTERPOLATION)
        whole = to_rgb(frame, (height, width))
        for scale in (2, 2.5, 3, 3.5, 4):
            size = (round(height / scale), round(width / scale))
            bicubic = F.interpolate(whole[None], size, mode="bicubic", antialias=True)[0]
            values.append(psnr(to_rgb(frame, size), bicubic))
    assert np.mean(values) >= 38 and min(values) >= 36


def thread_count(paths: list[str]) -> int:
    with VideoReader(paths[0]) as reader:
        return reader._decoder.thread_count


def test_a_worker_process_decodes_on_one_thread(clips):
    paths = [zoo.make_zoo_clip(clips, "h264.mp4")]
    loader = torch.utils.data.DataLoader(paths, num_workers=1, collate_fn=thread_count)
    assert list(loader) == [1]


def test_the_notebook_runs(monkeypatch, capsys):
    notebook = json.loads((REPO / "how_to_read_video_faster.ipynb").read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in code]
    printing = [cell for cell, source in zip(code, sources) if "print(" in source]
    assert all(cell["outputs"] for cell in printing)  # committed with them
    monkeypatch.setenv("CLIP_SECONDS", "2")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names = {}
    for source in sources:
        exec(source.replace("ROUNDS = 3", "ROUNDS = 1"), names)
    printed = capsys.readouterr().out
    assert "60 frames" in printed and "times faster" in printed


def cut_off(path, share):
    with open(path, "rb") as file:
        content = file.read()
    return content[: int(share * len(content))]


@pytest.mark.parametrize(
    "name", [n for n in zoo.CLIPS if n.endswith(("mp4", "mov", "mkv", "webm", "avi"))]
)
def test_a_clip_that_was_cut_off_is_told(clips, tmp_path, name):
    """Whole ones pass: see test_frames_equal_those_of_a_full_decode."""
    for share in (0.3, 0.6, 0.9):
        content = cut_off(zoo.make_zoo_clip(clips, name), share)
        (tmp_path / name).write_bytes(content)
        for source in (str(tmp_path / name), content):
            with pytest.raises((ValueError, av.error.FFmpegError)) as info:
                probe_media(video(source), POLICY)
            if name.endswith(("mkv", "webm")):
                assert f"cut off: {len(content):,} of" in str(info.value)


def test_a_recording_of_a_live_stream_is_no_file_that_was_cut_off(clips, tmp_path):
    """Nor what its container does not tell: such clips are shorter, and nothing else."""
    source = zoo.make_zoo_clip(clips, "vp9.webm")
    live = zoo.copy_packets(source, tmp_path / "live.webm", options={"live": "1"}, format="webm")
    for path, share, num_frames in (
        (live, 1, range(40, 41)),
        (live, 0.6, range(20, 30)),
        (zoo.make_zoo_clip(clips, "h264.ts"), 0.6, range(20, 30)),
    ):
        with VideoReader(io.BytesIO(cut_off(path, share)), 1) as reader:
            assert len(reader) in num_frames


def test_a_pipe_given_to_the_reader_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="not a file"):
        VideoReader(str(tmp_path / "a.mp4"))
    with pytest.raises(ValueError, match="not a regular file"):
        resolve(str(tmp_path / "a.mp4"))
