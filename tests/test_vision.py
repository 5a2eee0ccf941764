"""Pictures and clips of every format come in right, at the promised size, or not at all."""

import base64
import dataclasses
import http.server
import io
import operator
import os
import random
import threading
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from av.sidedata.sidedata import Type as SideData
from conftest import REPO, encoder_for, image, user, video
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils import vision_process as qwen

from util.data.conversation import parse_conversation
from util.media import source as media_source
from util.media import video_reader
from util.media.image import image_size, read_image
from util.media.source import check_media_item, describe, resolve
from util.media.video_reader import VideoReader, how_it_is_shown
from util.model.families import convert_box
from util.vision_util import (
    PixelPolicy,
    clip_metadata,
    frame_indices,
    load_frames,
    load_media,
    probe_media,
    smart_resize,
)

POLICY = PixelPolicy(
    min_pixels=4 * 28 * 28,
    max_pixels=64 * 28 * 28,
    video_fps=2.0,
    video_max_frames=768,
    video_max_pixels=768 * 28 * 28,
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
)
PHOTOS = sorted([*REPO.glob("train_data/*.jpg"), *REPO.glob("test_data/*.jpg")])


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


def psnr(a, b) -> float:
    mean_square = np.mean((np.float64(a) - np.float64(b)) ** 2)
    return float(10 * np.log10(255**2 / max(mean_square, 1e-9)))


def hwc(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def full_decode(path: str) -> list[av.VideoFrame]:
    """Return every frame that a plain decoder shows, in order."""
    with av.open(path) as container:
        return list(container.decode(video=0))


def to_rgb(frame: av.VideoFrame, size: tuple[int, int], turns: int = 0) -> torch.Tensor:
    height, width = size[::-1] if turns % 2 else size
    rgb = frame.reformat(width, height, "rgb24", interpolation=video_reader.INTERPOLATION)
    return torch.from_numpy(np.rot90(rgb.to_ndarray(), turns).copy()).permute(2, 0, 1)


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    "form, options, least",
    [
        ("PNG", {}, 99),
        ("BMP", {}, 99),
        ("TIFF", {}, 99),
        ("TIFF", {"compression": "tiff_lzw"}, 99),
        ("WEBP", {"lossless": True}, 99),
        ("WEBP", {}, 30),
        ("JPEG", {"quality": 95}, 35),
        ("JPEG", {"quality": 95, "progressive": True}, 35),
        ("AVIF", {"quality": 95}, 33),
        ("GIF", {}, 25),
        ("PPM", {}, 99),
    ],
)
def test_formats(form, options, least):
    pixels = zoo.smooth(60, 90)
    content = zoo.encode_image(pixels, form, **options)
    assert image_size(io.BytesIO(content)) == (60, 90)
    got = hwc(read_image(io.BytesIO(content)))
    assert np.array_equal(got, pixels) if least == 99 else psnr(got, pixels) > least


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(form, orientation):
    pixels = zoo.smooth(48, 80)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = zoo.STORED[orientation](pixels)
    content = io.BytesIO(zoo.encode_image(np.ascontiguousarray(stored), form, exif=exif))
    assert image_size(content) == (48, 80)
    assert psnr(hwc(read_image(content)), pixels) > 25


def test_alpha_is_composed_over_white():
    pixels = zoo.smooth(40, 40, 4)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    for form in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        got = hwc(read_image(io.BytesIO(zoo.encode_image(pixels, form, **options))))
        assert np.abs(got - expected).max() <= 1.5
    palette = Image.fromarray(pixels[..., :3]).quantize(16)
    for form in ("PNG", "GIF"):
        buffer = io.BytesIO()
        palette.save(buffer, form, transparency=3)
        got = hwc(read_image(buffer))
        hidden = np.asarray(palette) == 3
        assert hidden.any() and (got[hidden] == 255).all()
        assert np.array_equal(got[~hidden], np.asarray(palette.convert("RGB"))[~hidden])


def test_modes_are_converted_properly():
    grey = zoo.smooth(40, 60, 1)[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for form in ("PNG", "TIFF"):
        wide = grey.astype(np.uint16) << 8
        assert np.array_equal(hwc(read_image(io.BytesIO(zoo.encode_image(wide, form)))), expected)
        got = hwc(read_image(io.BytesIO(zoo.encode_image(grey, form))))
        assert np.array_equal(got, expected)
    pgm = b"P5 60 40 65535 " + wide.astype(">u2").tobytes()
    assert np.array_equal(hwc(read_image(io.BytesIO(pgm))), expected)
    colours = zoo.smooth(40, 60)
    for form, least in (("JPEG", 30), ("TIFF", 60)):
        buffer = io.BytesIO()
        Image.fromarray(colours).convert("CMYK").save(buffer, form)
        assert psnr(hwc(read_image(buffer)), colours) > least, form
    buffer = io.BytesIO()
    palette = Image.fromarray(colours).convert("P")
    palette.save(buffer, "PNG")
    assert np.array_equal(hwc(read_image(buffer)), np.asarray(palette.convert("RGB")))
    bits = (grey > 128).astype(np.uint8) * 255
    buffer = io.BytesIO()
    Image.fromarray(bits).convert("1").save(buffer, "PNG")
    assert np.array_equal(hwc(read_image(buffer))[..., 0], bits)


def test_the_first_frame_of_an_animation_is_the_picture():
    for form in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
        options = {"lossless": True} if form == "WEBP" else {}
        frames[0].save(buffer, form, save_all=True, append_images=frames[1:], **options)
        assert hwc(read_image(buffer))[15, 20].tolist() == [255, 0, 0]


def test_every_source_gives_the_same_picture(tmp_path, monkeypatch):
    content = zoo.encode_image(zoo.smooth(60, 90), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(content)
    data = base64.b64encode(content).decode()
    opened = Image.open(path)
    sources = [
        *(str(path), path.as_uri(), f"file://{path}", content, opened),
        f"data:image/png;base64,{data}",
        f"data:image/png;base64,{data[:50]}\n{data[50:]}",
    ]
    expected, shape = load_media(image(str(path)), POLICY)
    for source in sources:
        for _ in range(2):  # a PIL image can be used again
            got, same_shape = load_media(image(source), POLICY)
            assert same_shape == shape == probe_media(image(source), POLICY)
            assert torch.equal(got, expected)


def test_media_in_the_data_are_found_whatever_they_are(tiny_folder, tmp_path):
    content = zoo.encode_image(zoo.smooth(60, 90), "PNG")
    (tmp_path / "a b.png").write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    encoder = encoder_for(tiny_folder)
    items = [
        *(image(s) for s in ("a b.png", uri, content, "file://" + str(tmp_path / "a%20b.png"))),
        video(["a b.png", uri, content]) | {"max_pixels": 30000},
    ]
    [message] = encoder.prepare({"messages": [user(*items)]}, tmp_path)
    found = [item[item["type"]] for item in message["content"]]
    assert found[0] == found[3] == found[4][0] == str(tmp_path / "a b.png")
    assert found[1:3] == found[4][1:] == [uri, content]
    bad = "data:image/png;base64," + "A" * 5000
    record = {"messages": [user(image(bad)), {"role": "assistant", "content": "x"}]}
    with pytest.raises(ValueError) as info:
        encoder.measure(record)
    assert "message 0" in str(info.value) and len(str(info.value)) < 300


# ------------------------------------------------------------------ the network


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a picture, faults, and answers that never come to an end."""

    picture = zoo.encode_image(zoo.smooth(60, 90), "PNG")

    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == "/missing.png":
            return self.send_error(404)
        if self.path == "/stall.png":
            return self.server.done.wait(20)
        self.send_response(200)
        self.end_headers()
        if self.path == "/trickle.png":
            while not self.server.done.wait(0.05):
                self.wfile.write(b"x")
        elif self.path == "/endless.png":
            while not self.server.done.is_set():
                self.wfile.write(bytes(1 << 16))
        else:
            self.wfile.write(self.picture)

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # the client has had enough
            pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads, server.paths, server.done = True, [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.done.set()
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_only_when_allowed(server, monkeypatch):
    item = image(server.url + "/a.png")
    with pytest.raises(ValueError, match="--allow_remote_media"):
        probe_media(item, POLICY)
    assert not server.paths
    remote = dataclasses.replace(POLICY, allow_remote_media=True)
    assert probe_media(item, remote) == load_media(item, remote)[1]
    monkeypatch.setattr(media_source, "REMOTE_SECONDS", 0.5)
    monkeypatch.setattr(media_source, "MAX_REMOTE_BYTES", 1 << 20)
    for path, reason in (
        ("missing", "404"),
        ("stall", "answer|timed out"),
        ("trickle", "no complete answer"),
        ("endless", "larger than 1 MiB"),
    ):
        start = time.monotonic()
        with pytest.raises(ValueError, match=reason):
            probe_media(image(f"{server.url}/{path}.png"), remote)
        assert time.monotonic() - start < 5


def test_a_playlist_does_not_call_out(server, tmp_path):
    path = tmp_path / "list.m3u8"
    path.write_text(f"#EXTM3U\n#EXTINF:10,\n{server.url}/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises((ValueError, av.error.FFmpegError)):
        load_media(video(str(path)), dataclasses.replace(POLICY, allow_remote_media=True))
    assert not server.paths


# ------------------------------------------------------------------ the pixel policy

SIDES = st.integers(1, 3000)


@settings(max_examples=500, deadline=None)
@given(SIDES, SIDES, st.integers(1, 400), st.integers(1, 400), st.sampled_from((28, 32)))
def test_smart_resize_is_that_of_qwen_vl_utils(height, width, low, more, factor):
    limits = (low * factor**2, (low + more) * factor**2)
    try:
        expected = qwen.smart_resize(height, width, factor, *limits)
    except ValueError:
        with pytest.raises(ValueError, match="200 times"):
            smart_resize(height, width, factor, *limits)
        return
    size = smart_resize(height, width, factor, *limits)
    assert all(side > 0 and side % factor == 0 for side in size)
    # transformers, which this follows, never goes below one token, and does not raise a side
    # under half a token before it compares with the limits.
    if min(height, width) > factor / 2 and 0 not in expected:
        assert size == expected


def optional(**strategies):
    return st.fixed_dictionaries({}, optional=strategies)


@settings(max_examples=500, deadline=None)
@given(
    st.integers(2, 20000),
    st.sampled_from((1.0, 24.0, 25.0, 29.97, 30.0, 60.0)),
    st.one_of(
        st.fixed_dictionaries({"nframes": st.integers(2, 900)}),
        optional(
            fps=st.floats(0.1, 40),
            min_frames=st.integers(1, 50),
            max_frames=st.integers(2, 900),
        ),
    ),
)
def test_num_frames_is_that_of_qwen_vl_utils(total, rate, keys):
    try:
        expected = qwen.smart_nframes(dict(keys), total, rate)
    except ValueError:
        with pytest.raises(ValueError, match="nframes"):
            POLICY.num_frames(total, rate, **keys)
    else:
        assert POLICY.num_frames(total, rate, **keys) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.integers(2, 5000),
    st.sampled_from((24.0, 25.0, 30.0, 60.0)),
    optional(video_start=st.floats(0, 100), video_end=st.floats(0.1, 200)),
)
def test_time_range_is_that_of_qwen_vl_utils(total, rate, item):
    # On a frame's own time qwen-vl-utils depends on the last bit of a product.
    item = {key: round(value * rate) / rate + 0.4 / rate for key, value in item.items()}
    reader = type("Clip", (), {"seconds": np.arange(total) / rate, "fps": rate})
    try:
        start, end, inside = qwen.calculate_video_frame_range(item, total, rate)
    except ValueError:
        return
    num_frames = qwen.smart_nframes({}, inside, rate) if inside > 1 else 2
    expected = torch.linspace(start, end, num_frames, dtype=torch.float64).round().int().tolist()
    assert frame_indices(item, reader, POLICY) == expected


@settings(max_examples=300, deadline=None)
@given(
    *(SIDES, SIDES, st.integers(1, 384)),
    optional(
        min_pixels=st.integers(50000, 150000),
        max_pixels=st.integers(150000, 10**6),
        total_pixels=st.integers(10**6, 10**8),
    ),
    st.booleans(),
)
def test_frame_size_is_that_of_qwen_vl_utils(height, width, pairs, keys, is_given):
    num_frames = 2 * pairs
    if is_given:
        keys |= {"resized_height": height, "resized_width": width}
    if max(height, width) > 199 * min(height, width) or min(height, width) < 15:
        return
    low = keys.get("min_pixels", 100352)
    total = keys.get("total_pixels", 128000 * 784 * 0.9)
    high = max(min(768 * 784, total / num_frames * 2), int(low * 1.05))
    high = min(keys.get("max_pixels", high), high)
    if is_given:
        expected = qwen.smart_resize(height, width, 28)
    else:
        expected = qwen.smart_resize(height, width, 28, low, high)
    if 0 not in expected:
        assert POLICY.frame_size(num_frames, height, width, **keys) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    optional(
        min_pixels=st.integers(1, 10**6),
        max_pixels=st.integers(1, 10**6),
    ),
    st.booleans(),
)
def test_probe_says_what_load_makes_of_pictures(height, width, keys, is_given):
    item = image(Image.new("RGB", (width, height))) | keys
    if is_given:
        item |= {"resized_height": height, "resized_width": width}
    try:
        shape = probe_media(item, POLICY)
    except ValueError as error:
        assert "200 times" in str(error) or "is above" in str(error)
        with pytest.raises(ValueError):
            load_media(item, POLICY)
        return
    patches, loaded_shape = load_media(item, POLICY)
    assert shape == loaded_shape and len(patches) == np.prod(shape.grid) > 0


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(("h264.mp4", "variable_rate.mkv", "rotated.mp4", "one_frame.mp4", "list")),
    optional(fps=st.floats(0.1, 60), min_frames=st.integers(1, 9), max_frames=st.integers(2, 40)),
    optional(
        min_pixels=st.integers(1, 50000),
        max_pixels=st.integers(1, 100000),
        total_pixels=st.integers(1, 10**6),
    ),
    optional(video_start=st.floats(0, 2), video_end=st.floats(0, 3)),
)
def test_probe_says_what_load_makes_of_clips(clips, name, rates, sizes, part):
    if name == "list":
        item = video([Image.new("RGB", (90, 70))] * 3) | sizes
    else:
        item = video(zoo.make_zoo_clip(clips, name)) | rates | sizes | part
    try:
        shape = probe_media(item, POLICY)
    except ValueError:
        with pytest.raises(ValueError):
            load_media(item, POLICY)
        return
    patches, loaded_shape = load_media(item, POLICY)
    assert shape == loaded_shape and len(patches) == np.prod(shape.grid) > 0


def test_sizes_of_an_items_own_go_before_the_limits():
    def size(**keys):
        _, h, w = probe_media(image(Image.new("RGB", (1000, 500))) | keys, POLICY).grid
        return h * 14, w * 14

    assert size() == (140, 308)
    assert size(resized_height=300, resized_width=300) == (308, 308)
    assert size(max_pixels=784 * 256) == (308, 616)
    assert size(min_pixels=784 * 256) == (308, 616)
    assert size(max_pixels=784) == (28, 28)
    with pytest.raises(ValueError, match="min_pixels 9000 is above max_pixels 4000"):
        size(min_pixels=9000, max_pixels=4000)


@pytest.mark.parametrize(
    "item, words",
    [
        (image("a") | {"fps": 1}, "unknown key 'fps'"),
        (video("a") | {"speed": 1}, "unknown key 'speed'"),
        (video("a") | {"fps": 1, "nframes": 2}, "exclude each other"),
        (video("a") | {"fps": 0}, "fps 0: must be a number above 0"),
        (video("a") | {"nframes": 2.5}, "nframes 2.5: must be a whole number"),
        (video("a") | {"min_frames": True}, "min_frames True"),
        (video("a") | {"fps": "2"}, "fps '2'"),
        (video("a") | {"resized_height": 28}, "go together"),
        (video(["a", "b"]) | {"nframes": 2}, "list of frames"),
        (video([]), "list of pictures"),
        (video(["a", ""]), "list of pictures"),
        (image(["a"]), 'needs a string "image"'),
    ],
)
def test_keys_that_make_no_sense(item, words):
    with pytest.raises(ValueError, match="message 0, item 0: .*" + words):
        parse_conversation({"messages": [user(item)]})


def test_keys_that_make_sense():
    check_media_item(video("a") | {"fps": 0.5, "video_start": 0, "video_end": 2.5})
    check_media_item(video(["a"]) | {"fps": 2, "max_pixels": 5000})
    assert len(describe(video("data:" + "x" * 10**6)["video"])) < 100


def test_boxes():
    size, box = (500, 1000), [100, 50, 1000, 500]
    resized = POLICY.image_size(*size)
    assert resized == (140, 308)
    for model_type in ("qwen2_vl", "qwen3_vl"):
        assert convert_box(box, size, resized, model_type) == [100, 100, 1000, 1000]
    assert convert_box(box, size, resized, "qwen2_5_vl") == [31, 14, 308, 140]
    assert convert_box([-5, 600], size, resized, "qwen2_vl") == [0, 1000]
    with pytest.raises(ValueError, match="llava"):
        convert_box(box, size, resized, "llava")


# ------------------------------------------------------------------ clips


@pytest.mark.parametrize("name", zoo.CLIPS)
def test_frames_equal_those_of_a_full_decode(clips, name):
    """For any frames wanted, on one and on two decoder threads, in any order, some twice."""
    path = zoo.make_zoo_clip(clips, name)
    decoded = full_decode(path)
    turns = 1 if name == "rotated.mp4" else 0
    chance = random.Random(name)
    for num_threads in (1, 2):
        with VideoReader(path, num_threads) as reader:
            num_frames = len(reader)
            assert num_frames == len(decoded)
            expected = [to_rgb(frame, reader.size, turns) for frame in decoded]
            assert len({frame.numpy().tobytes() for frame in expected}) == num_frames
            for count in (1, 2, 5, num_frames):
                indices = chance.choices(range(num_frames), k=count)
                frames = reader.get_frames_at(indices)
                assert all(torch.equal(expected[i], f) for i, f in zip(indices, frames)), indices


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


def test_only_the_frames_that_are_kept_are_converted(clips, monkeypatch):
    converted = []
    original = VideoReader._to_rgb

    def count(self, frame, height, width):
        converted.append((height, width))
        return original(self, frame, height, width)

    monkeypatch.setattr(VideoReader, "_to_rgb", count)
    with VideoReader(zoo.make_zoo_clip(clips, "one_group.mp4")) as reader:
        reader.get_frames_at([3, 30, 30], 56, 84)
    assert converted == [(56, 84)] * 2


def test_times_come_from_presentation_timestamps(clips):
    with VideoReader(zoo.make_zoo_clip(clips, "variable_rate.mp4")) as reader:
        frames = full_decode(reader._source)
        expected = [float((f.pts - frames[0].pts) * f.time_base) for f in frames]
        assert reader.seconds.tolist() == pytest.approx(expected)
        assert reader.index_at(expected[7]) == 7
        assert reader.index_at((expected[7] + expected[8]) / 2) == 7
        assert reader.index_at(-1.0) == 0 and reader.index_at(10**6) == len(reader) - 1
        at_times = reader.get_frames_at([expected[7], expected[20]], 28, 28)
        assert torch.equal(at_times, reader.get_frames_at([7, 20], 28, 28))
        # Evenly spread over time, not over numbers of frames.
        indices = frame_indices({"nframes": 6}, reader, POLICY)
        wanted = np.linspace(0, expected[-1], 6)
        nearest = [int(np.abs(np.array(expected) - t).argmin()) for t in wanted]
        assert indices == nearest != np.linspace(0, len(frames) - 1, 6).round().tolist()


def test_rates_and_durations(clips):
    for name in ("h264.mp4", "h264.mkv", "h264.ts", "h264.avi", "late_start.mp4", "vp9.webm"):
        with VideoReader(zoo.make_zoo_clip(clips, name)) as reader:
            assert reader.fps == zoo.CLIP_RATE and len(reader) == zoo.NUM_FRAMES, name
            assert reader.seconds == pytest.approx(np.arange(40) / 25, abs=6e-4)
    with VideoReader(zoo.make_zoo_clip(clips, "one_frame.mp4")) as reader:
        assert frame_indices({}, reader, POLICY) == [0, 0]


def test_frames_are_numbered_as_at_a_constant_rate(clips):
    """number / fps is the time of a frame: exact numbers at a constant rate, else fractions."""
    for name in ("h264.mp4", "h264.mkv", "h264.ts", "h264.avi", "late_start.mp4", "vp9.webm"):
        with VideoReader(zoo.make_zoo_clip(clips, name)) as reader:
            got = clip_metadata({"video_start": 0.39, "video_end": 0.81}, reader, [10, 20])
            assert (got.frames_indices, got.fps, got.total_num_frames) == ([10, 20], 25, 11), name
    with VideoReader(zoo.make_zoo_clip(clips, "variable_rate.mp4")) as reader:
        got = clip_metadata({}, reader, [0, 7, 20, 39])
        assert got.timestamps == pytest.approx(reader.seconds[[0, 7, 20, 39]], abs=1e-3)
        assert got.sampled_fps == pytest.approx(4 / (reader.seconds[-1] + 1 / reader.fps))


def test_a_part_of_a_clip(clips):
    with VideoReader(zoo.make_zoo_clip(clips, "h264.mkv")) as reader:

        def indices(**keys):
            return frame_indices(keys, reader, POLICY)

        assert indices(nframes=40) == list(range(40))
        assert indices(video_start=0.4, video_end=0.8, fps=12.5) == [10, 13, 17, 20]
        assert indices(video_start=0.4, video_end=0.8, nframes=2) == [10, 20]
        assert indices(video_end=0.4, nframes=2) == [0, 10]
        assert indices(video_start=1.2, nframes=2) == [30, 39]
        with pytest.raises(ValueError, match="no frame from 5 to inf s: the clip ends at 1.560 s"):
            indices(video_start=5)
        with pytest.raises(ValueError, match="nframes 60: must be 2 to 40, the frames of the clip"):
            indices(nframes=60)


def test_an_edit_list_hides_frames(clips, tmp_path):
    path = zoo.make_trimmed(zoo.make_zoo_clip(clips, "h264.mov"), tmp_path / "a.mp4", start=17)
    decoded = full_decode(path)
    with VideoReader(path) as reader:
        assert len(reader) == len(decoded) == zoo.NUM_FRAMES - 17
        expected = [to_rgb(frame, reader.size) for frame in decoded]
        for indices in ([0], [22], [3, 12], list(range(23))):
            frames = reader.get_frames_at(indices)
            assert all(torch.equal(expected[i], f) for i, f in zip(indices, frames))
    # The hidden frames are those before the cut.
    assert psnr(hwc(expected[0]), zoo.clip_frame(17, 96, 144)) > 25


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


def assert_reads_as_full_decode(path, num_frames):
    """Also one by one, and the times of the frames must be those that decoding tells."""
    decoded = full_decode(path)
    with VideoReader(path) as reader:
        assert len(reader) == len(decoded) == num_frames
        expected = [to_rgb(frame, reader.size) for frame in decoded]
        for indices in ([0], [num_frames - 1], [3, 12], list(range(num_frames))):
            frames = reader.get_frames_at(indices)
            assert all(torch.equal(expected[i], f) for i, f in zip(indices, frames))
        seconds = [float((f.pts - decoded[0].pts) * f.time_base) for f in decoded]
        assert reader.seconds == pytest.approx(seconds, abs=2e-3)


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
    source = zoo.make_zoo_clip(clips, "hevc_open_gop.ts")

    def from_the_second_key_frame(packets):
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        packets = packets[keys[1] :]
        first = packets[0].pts
        for packet in packets:
            packet.pts, packet.dts = packet.pts - first, packet.dts - first
        return packets

    path = zoo.copy_packets(source, tmp_path / "a.mkv", from_the_second_key_frame)
    assert_reads_as_full_decode(path, len(full_decode(path)))


def test_frames_that_are_never_shown_are_no_frames(clips, tmp_path):
    source = zoo.make_zoo_clip(clips, "vp8.webm")
    path = zoo.make_unshown(source, tmp_path / "a.webm", 17)
    assert_reads_as_full_decode(path, zoo.NUM_FRAMES)


def test_frames_at_the_same_time_do_not_change_the_times_of_others(tmp_path):
    options = {"g": "12", "bf": "0"}
    source = zoo.make_clip(tmp_path / "a.mkv", "libx264", options, ticks="variable")
    assert_reads_as_full_decode(source, zoo.NUM_FRAMES)
    path = zoo.make_equal_times(source, tmp_path / "b.mkv", 20)
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


def test_clips_from_bytes_and_odd_names(clips, tmp_path):
    path = zoo.make_zoo_clip(clips, "h264.mkv")
    expected, shape = load_media(video(path), POLICY)
    odd = tmp_path / "a:b c%20d.mkv"
    with open(path, "rb") as file:
        odd.write_bytes(file.read())
    data = "data:video/x-matroska;base64," + base64.b64encode(odd.read_bytes()).decode()
    for source in (odd.read_bytes(), data, str(odd), odd.as_uri()):
        assert probe_media(video(source), POLICY) == shape
        assert torch.equal(load_media(video(source), POLICY)[0], expected)


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


def test_a_worker_process_decodes_on_one_thread(clips):
    path = zoo.make_zoo_clip(clips, "h264.mp4")
    [counts] = torch.utils.data.DataLoader(
        _ThreadCount([path]), num_workers=1, collate_fn=lambda rows: rows[0]
    )
    assert counts == 1


class _ThreadCount(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with VideoReader(self.paths[i]) as reader:
            return reader._decoder.thread_count


def test_the_notebook_runs(monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(REPO / "how_to_read_video_faster.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code if "print(" in cell.source)  # committed with them
    monkeypatch.setenv("CLIP_SECONDS", "2")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    nbclient.NotebookClient(notebook, timeout=100).execute(cwd=str(REPO))
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "60 frames" in printed and "times faster" in printed


# ------------------------------------------------------------------ bad media


def bad_media(folder, clips):
    """Return (name, item) of every fault."""
    photo = zoo.encode_image(zoo.smooth(300, 400), "JPEG", quality=95)
    clip = open(zoo.make_zoo_clip(clips, "h264.mp4"), "rb").read()
    start = open(zoo.make_zoo_clip(clips, "faststart.mp4"), "rb").read()
    garbage = random.Random(0).randbytes(len(clip))
    third = len(clip) // 3
    files = {
        "truncated.jpg": photo[: len(photo) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not a picture",
        "header_only.png": zoo.encode_image(zoo.smooth(90, 90), "PNG")[:40],
        "thin.png": zoo.encode_image(zoo.smooth(2, 500), "PNG"),
        "no_end.mp4": clip[: len(clip) // 2],
        "cut.mp4": start[: len(start) * 3 // 4],
        "garbled.mp4": clip[:third] + garbage[third : 2 * third] + clip[2 * third :],
        "noise.mp4": garbage,
        "empty.mp4": b"",
        "text.mp4": b"not a video",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    zoo.bomb(folder / "bomb.png")
    zoo.make_audio(folder / "audio.mp4")
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.jpg").mkdir()
    (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")
    names = [path.name for path in folder.iterdir()]
    items = [(video if n.endswith("mp4") else image)(str(folder / n)) for n in names]
    return [*items, image("/dev/zero"), video("/dev/zero"), image(b""), image("data:,?")]


def test_bad_media_end_quickly_in_one_error(clips, tmp_path):
    for item in bad_media(tmp_path, clips):
        start = time.monotonic()
        with pytest.raises((ValueError, OSError)) as info:
            load_media(item, POLICY)
        assert str(info.value), item
        assert time.monotonic() - start < 5, item


def test_what_a_header_can_tell_is_found_before_decoding(clips, tmp_path):
    found = set()
    for item in bad_media(tmp_path, clips):
        try:
            probe_media(item, POLICY)
        except (ValueError, OSError):
            found.add(os.path.basename(str(item[item["type"]])))
    only_by_decoding = {"truncated.jpg", "header_only.png", "garbled.mp4"}
    everything = {path.name for path in tmp_path.iterdir()}
    assert everything - found <= only_by_decoding


def test_bad_media_name_sample_message_and_file(clips, tmp_path, tiny_folder):
    encoder = encoder_for(tiny_folder)
    for item in bad_media(tmp_path, clips)[:-2]:
        record = {"messages": [user(item), {"role": "assistant", "content": "x"}]}
        with pytest.raises(ValueError) as info:
            encoder.encode(record)
        assert "message 0" in str(info.value) and item[item["type"]] in str(info.value)


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
    with av.open(zoo.make_zoo_clip(clips, "vp9.webm")) as old:
        live = {"options": {"live": "1"}, "format": "webm"}
        with av.open(str(tmp_path / "live.webm"), "w", **live) as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    new.mux(packet)
    for path, share, num_frames in (
        (tmp_path / "live.webm", 1, range(40, 41)),
        (tmp_path / "live.webm", 0.6, range(20, 30)),
        (zoo.make_zoo_clip(clips, "h264.ts"), 0.6, range(20, 30)),
    ):
        with VideoReader(io.BytesIO(cut_off(path, share)), 1) as reader:
            assert len(reader) in num_frames


def test_a_picture_of_one_pixel_is_a_picture():
    patches, shape = load_media(image(zoo.encode_image(zoo.smooth(1, 1), "PNG")), POLICY)
    assert shape.grid == (1, 4, 4) and len(patches) == 16


def test_a_pipe_given_to_the_reader_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="not a file"):
        VideoReader(str(tmp_path / "a.mp4"))
    with pytest.raises(ValueError, match="not a regular file"):
        resolve(str(tmp_path / "a.mp4"))
