"""A packed micro-batch gives what each of its samples gives alone."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, encoder_for, plain_model, set_up, tiny_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, modeling_flash_attention_utils

from benchmarks.fuzz import check_packing
from util.data.batch import pack
from util.data.conversation import media_of
from util.data.sample import IGNORE
from util.model.inputs import InputBuilder
from util.model.load import load_processor
from util.vision_util import load_frames


@pytest.fixture(scope="module")
def run(mixed_data, tiny_folder):
    return set_up(tiny_config(train_data=[mixed_data]), tiny_folder)


def alone_inputs(run, sample):
    """Return the inputs of one sample as a processor would give them: clips as clips."""
    inputs = {"input_ids": sample.input_ids[None], "position_ids": sample.position_ids[:, None]}
    parts = sample.patches.split([t * h * w for t, h, w in sample.grids])
    for kind, grids, pixels in (
        ("image", "image_grid_thw", "pixel_values"),
        ("video", "video_grid_thw", "pixel_values_videos"),
    ):
        chosen = [i for i, media_type in enumerate(sample.media_types) if media_type == kind]
        if chosen:
            inputs[grids] = torch.tensor([sample.grids[i] for i in chosen])
            inputs[pixels] = run.build_inputs.normalize(torch.cat([parts[i] for i in chosen]))
    return inputs


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_packed_equals_alone(run, tiny_folder):
    """Logits and gradients, text and images and videos mixed, against stock attention."""
    samples = [run.encoder.encode(run.records[i]) for i in (0, 1, 4, 3, 5, 7, 9)]
    model = plain_model(tiny_folder)
    alone_logits = []
    for sample in samples:
        logits = model(**alone_inputs(run, sample)).logits[0, :-1]
        targets = sample.labels[1:]
        F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE).backward()
        alone_logits.append(logits[targets != IGNORE].detach())

    run.model.zero_grad()
    micro_batch = pack(samples, run.encoder)
    logits = run.model(**run.build_inputs(micro_batch)).logits[0]
    F.cross_entropy(logits, micro_batch.targets, reduction="sum").backward()
    torch.testing.assert_close(logits, torch.cat(alone_logits), atol=1e-5, rtol=1e-5)
    difference = (gradients(run.model) - gradients(model)).norm() / gradients(model).norm()
    assert difference < 1e-5


def test_the_dummy_segment_reaches_every_parameter_and_changes_none(run):
    run.model.zero_grad()
    micro_batch = pack([], run.encoder)
    logits = run.model(**run.build_inputs(micro_batch)).logits[0]
    assert len(logits) == 0
    F.cross_entropy(logits, micro_batch.targets, reduction="sum").backward()
    assert all(p.grad is not None for p in run.model.parameters())
    assert all(p.grad.count_nonzero() == 0 for p in run.model.parameters())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=30),
    *(st.integers(1, 12), st.integers(30, 900), st.integers(1, 5), st.integers(0, 3)),
)
def test_packing_keeps_every_token_once_in_order_under_the_limit(
    tiny_folder, lengths, batch_size, capacity, world_size, seed
):
    assume(min(lengths) <= capacity)
    check_packing(encoder_for(tiny_folder), lengths, batch_size, capacity, world_size, seed)


def test_samples_equal_what_the_processor_makes(run, tiny_folder):
    """Token ids, positions and pixels, against AutoProcessor and the model's own positions."""
    processor = load_processor(tiny_folder, run.config)
    model = plain_model(tiny_folder)
    compared = []
    for i in (0, 2, 4, 6, 8, 14):  # answers without a leading newline: see test_labels.py
        sample = run.encoder.encode(run.records[i])
        messages = run.encoder.prepare(run.records[i])
        items = [item for _, item in media_of(messages)]
        images = [Image.open(item["image"]) for item in items if item["type"] == "image"]
        videos = [load_frames(v, run.encoder.policy) for v in items if v["type"] == "video"]
        expected = processor(
            text=[run.encoder.render(messages)],
            images=images or None,
            videos=videos or None,
            videos_kwargs={"do_resize": False},  # the reader has shrunk them already
            return_tensors="pt",
        )
        assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
        types = run.encoder.token_types(sample.input_ids)
        assert types.tolist() == expected["mm_token_type_ids"][0].tolist()
        for name in ("pixel_values", "pixel_values_videos"):
            if name in expected:
                pixels = run.build_inputs.normalize(sample.patches)
                torch.testing.assert_close(pixels, expected[name], atol=1e-6, rtol=0)
                compared.append(name)
        position_ids, _ = model.model.get_rope_index(
            sample.input_ids[None],
            expected["mm_token_type_ids"],
            image_grid_thw=expected.get("image_grid_thw"),
            video_grid_thw=expected.get("video_grid_thw"),
        )
        assert torch.equal(position_ids[:, 0], sample.position_ids)
    assert set(compared) == {"pixel_values", "pixel_values_videos"}


def test_saved_processor_resizes_as_training_did(run, tiny_folder, tmp_path):
    load_processor(tiny_folder, run.config).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.padding_side == "left"
    big = torch.randint(0, 256, (3, 500, 900), dtype=torch.uint8)
    grid = processor.image_processor([big], return_tensors="pt")["image_grid_thw"][0]
    policy = run.encoder.policy
    assert tuple(grid.tolist()) == policy.grid(1, *policy.image_size(500, 900))
    for num_frames in (4, 40, 400):
        clip = torch.zeros((num_frames, 3, 180, 320), dtype=torch.uint8)
        grid = processor.video_processor([clip], return_tensors="pt")["video_grid_thw"][0]
        size = policy.frame_size(num_frames, 180, 320)
        assert tuple(grid.tolist()) == policy.grid(num_frames, *size)


def stand_in_for_flash(monkeypatch) -> list:
    """Put a stand-in for the kernel; return its calls as (is causal, ends of q, ends of k)."""
    calls = []

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        deterministic=False,
    ):
        assert cu_seqlens_q.dtype == torch.int32 and isinstance(max_seqlen_q, int)
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths) and sum(lengths) == len(q)
        calls.append((causal, cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))
        outputs = [
            F.scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in qkv),
                is_causal=causal,
                scale=softmax_scale,
                enable_gqa=True,
            ).transpose(0, 1)
            for qkv in zip(*(x.split(lengths) for x in (q, k, v)))
        ]
        return torch.cat(outputs)

    flash = modeling_flash_attention_utils
    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(flash, "_flash_varlen_fn", flash_attn_varlen_func)
    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", process)
    return calls


def test_flash_attention_gets_the_segment_ends(run, tiny_folder, monkeypatch):
    """With a stand-in for the kernel: the right cu_seqlens arrive, and the logits are the same."""
    calls = stand_in_for_flash(monkeypatch)
    model = plain_model(tiny_folder)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation = "flash_attention_2"
    processor = load_processor(tiny_folder, run.config)
    build_inputs = InputBuilder(processor, "flash_attention_2", CPU)

    samples = [run.encoder.encode(run.records[i]) for i in (0, 1, 4, 3)]
    micro_batch = pack(samples, run.encoder)
    with torch.no_grad():
        logits = model(**build_inputs(micro_batch)).logits
        expected = run.model(**run.build_inputs(micro_batch)).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    lengths = [len(sample.input_ids) for sample in samples] + [1]
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    grids = [grid for sample in samples for grid in sample.grids] + [(1, 2, 2)]
    frames = [h * w for t, h, w in grids for _ in range(t)]
    vision_ends = [0, *torch.tensor(frames).cumsum(0).tolist()]
    num_layers = model.config.text_config.num_hidden_layers
    depth = model.config.vision_config.depth
    assert calls == [(False, vision_ends, vision_ends)] * depth + [(True, ends, ends)] * num_layers


def test_segments_of_one_length_are_one_call(run, monkeypatch):
    """Frames of a video side by side: a call a layer, and not a call a frame and layer."""
    samples = [run.encoder.encode(run.records[i]) for i in (4, 4)]  # of a video each
    micro_batch, shapes = pack(samples, run.encoder), []
    num_frames = [t for sample in samples for t, _, _ in sample.grids]
    assert min(num_frames) > 1
    attend = F.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        shapes.append(tuple(query.shape[:2]))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    with torch.no_grad():
        run.model(**run.build_inputs(micro_batch))
    vision, text = run.model.config.vision_config, run.model.config.text_config
    # After the samples comes what fills up: a token, and a picture of one frame.
    of_vision = [(sum(num_frames), vision.num_heads), (1, vision.num_heads)]
    of_text = [(2, text.num_attention_heads), (1, text.num_attention_heads)]
    assert shapes == of_vision * vision.depth + of_text * text.num_hidden_layers


def test_a_step_needs_logits_only_where_tokens_are_supervised(run):
    samples = [run.encoder.encode(run.records[i]) for i in range(5)]
    micro_batch = pack(samples, run.encoder)
    logits = run.model(**run.build_inputs(micro_batch)).logits
    num_supervised = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    assert logits.shape[:2] == (1, num_supervised)
    assert num_supervised < micro_batch.input_ids.shape[1] / 2
