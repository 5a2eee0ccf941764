"""Pictures and clips come at the promised size, or not at all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils import vision_process as qwen

import zoo
from helpers import POLICY, image, video
from util import vision_util
from util.model.families import convert_box, read_boxes
from util.vision_util import frame_indices, load_frames, load_media, probe_media, smart_resize

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
    optional(fps=st.floats(0.1, 40)) | st.fixed_dictionaries({"nframes": st.integers(2, 60)}),
)
def test_time_range_is_that_of_qwen_vl_utils(total, rate, item, keys):
    # On a frame's own time qwen-vl-utils depends on the last bit of a product.
    item = {key: round(value * rate) / rate + 0.4 / rate for key, value in item.items()}
    reader = type("Clip", (), {"seconds": np.arange(total) / rate, "fps": rate})
    try:
        start, end, inside = qwen.calculate_video_frame_range(item, total, rate)
        num_frames = qwen.smart_nframes(dict(keys), inside, rate) if inside > 1 else 2
    except ValueError:
        return
    expected = torch.linspace(start, end, num_frames, dtype=torch.float64).round().int().tolist()
    assert frame_indices(item | keys, reader, POLICY) == expected


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


def assert_probe_says_what_load_makes_of(item):
    try:
        shape = probe_media(item, POLICY)
    except ValueError:
        with pytest.raises(ValueError):
            load_media(item, POLICY)
    else:
        patches, loaded_shape = load_media(item, POLICY)
        assert shape == loaded_shape and len(patches) == np.prod(shape.grid) > 0


SMALL, PIXELS = st.integers(1, 400), st.integers(1, 10**6)


@settings(max_examples=60, deadline=None)
@given(SMALL, SMALL, optional(min_pixels=PIXELS, max_pixels=PIXELS), st.booleans())
def test_probe_says_what_load_makes_of_pictures(height, width, keys, is_given):
    if is_given:
        keys |= {"resized_height": height, "resized_width": width}
    assert_probe_says_what_load_makes_of(image(Image.new("RGB", (width, height))) | keys)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(("h264.mp4", "variable_rate.mkv", "rotated.mp4", "one_frame.mp4", "list")),
    optional(fps=st.floats(0.1, 60), min_frames=st.integers(1, 9), max_frames=st.integers(2, 40)),
    optional(
        min_pixels=st.integers(1, 50000),
        max_pixels=st.integers(1, 100000),
        total_pixels=PIXELS,
    ),
    optional(video_start=st.floats(0, 2), video_end=st.floats(0, 3)),
)
def test_probe_says_what_load_makes_of_clips(clips, name, rates, sizes, part):
    if name == "list":
        item = video([Image.new("RGB", (90, 70))] * 3) | sizes
    else:
        item = video(zoo.make_zoo_clip(clips, name)) | rates | sizes | part
    assert_probe_says_what_load_makes_of(item)


def test_sizes_of_an_items_own_go_before_the_limits():
    def size(**keys):
        _, h, w = probe_media(image(Image.new("RGB", (1000, 500))) | keys, POLICY).grid
        return h * 14, w * 14

    assert size() == (140, 308)
    assert size(resized_height=300, resized_width=300) == (308, 308)
    assert size(max_pixels=784 * 256) == (308, 616)
    assert size(min_pixels=784 * 256) == (308, 616)
    assert size(max_pixels=784) == (28, 28)
    assert probe_media(image(Image.new("RGB", (1, 1))), POLICY).grid == (1, 4, 4)
    with pytest.raises(ValueError, match="min_pixels 9000 is above max_pixels 4000"):
        size(min_pixels=9000, max_pixels=4000)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_boxes_are_read_in_the_units_they_are_converted_to(model_type):
    x1, y1, x2, y2 = convert_box([100, 50, 1000, 500], (500, 1000), (140, 308), model_type)
    box, point = pytest.approx([0.1, 0.1, 1, 1], abs=2e-3), pytest.approx([0.1, 0.1], abs=2e-3)
    name = "<|object_ref_start|>a < b<|object_ref_end|>"
    tokens = f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    json = f'{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "a \\"b\\", c"}}'
    texts = {
        f"See {name}{tokens}{tokens} and {tokens}.": [("a < b", box)] * 2 + [("", box)],
        f"<|box_start|>({x1}, {y1})<|box_end|>": [("", point)],
        f"```json\n[{json},\n{json}]\n```": [('a \\"b\\", c', box)] * 2,
        f"[{{'label': 'c', 'point_2d': [{x1}.0,{y1}.0]}}]": [("c", point)],
        f"It is [{x1}, {y1}, {x2}, {y2}].": [("", box)] * (model_type != "qwen2_vl"),
        "<|box_start|>(1,2),(3)<|box_end|> [1, 2, 3] {'bbox_2d': 4} <|box_end|>": [],
    }
    for text, expected in texts.items():
        assert read_boxes(text, (140, 308), model_type) == expected
    outside = f"<|box_start|>(0,0),({x2 * 2},{y2})<|box_end|>"
    assert read_boxes(outside, (140, 308), model_type) == [("", pytest.approx([0, 0, 2, 1]))]
    beyond = convert_box([-5, 600], (500, 1000), (140, 308), model_type)
    assert beyond == ([0, 140] if model_type == "qwen2_5_vl" else [0, 1000])


def test_boxes_of_other_models_are_not_known():
    sizes, outside = ((500, 1000), (140, 308)), "<|box_start|>(0,0),(9,9)<|box_end|>"
    assert read_boxes("No box.", sizes[1], "llava") == []
    with pytest.raises(ValueError, match="boxes of llava are not known"):
        read_boxes(outside, sizes[1], "llava")
    with pytest.raises(ValueError, match="llava"):
        convert_box([1, 2], *sizes, "llava")


def test_patches_are_put_together_again(clips):
    for item in (
        image(Image.effect_noise((60, 90), 99)),
        video(zoo.make_zoo_clip(clips, "h264.mp4")),
    ):
        patches, shape = load_media(item, POLICY)
        frames = load_frames(item, POLICY)
        whole = vision_util.unpatchify(patches, shape.grid, POLICY)
        assert torch.equal(whole[: len(frames)], frames)
        assert torch.equal(
            whole[len(frames) :], frames[-1:].expand(len(whole) - len(frames), -1, -1, -1)
        )
