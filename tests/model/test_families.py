"""The four families go through the same code, and what differs between them is right."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from qwen_vl_utils import vision_process as qwen
from safetensors import safe_open
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.utils import _to_kwargs
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.profiler import profile
from transformers import AutoModelForImageTextToText, AutoProcessor, modeling_flash_attention_utils
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.video_utils import VideoMetadata

import finetune
import helpers
import test_on_trained_model_by_us
import zoo
from families import build_family
from helpers import assistant, call, image, make_image, text, user, video
from util.config import UserError
from util.data.batch import pack
from util.data.conversation import media_of
from util.data.sample import IGNORE
from util.model import attention, families, inputs
from util.model.attention import hand_over_whole_rows, segment_lengths
from util.model.families import keep_samples_apart, part_of
from util.model.inputs import InputBuilder
from util.model.load import load_processor
from util.model.parts import place_media
from util.tools.generate import generate
from util.vision_util import load_frames

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
WITH_TIMES_AS_TEXT = ("qwen3_vl", "qwen3_5")


@pytest.fixture(scope="module")
def family_data(tmp_path_factory) -> str:
    """Text, pictures of several windows, clips: whole, at their own rates, parts, lists, three."""
    folder = tmp_path_factory.mktemp("families")
    clip = zoo.make_zoo_clip(folder, "h264.mp4")
    small = [make_image(folder / f"{i}.png", 70 + 30 * i, 110 + 40 * i, i) for i in range(3)]
    frames = [make_image(folder / f"f{i}.png", 64, 96, i) for i in range(5)]
    timed = video(frames[:4]) | {"timestamps": [0.0, 1.0, 6, 8.0]}
    what, answer = text("What is it?"), assistant("A red square that moves, then text.")
    return helpers.write_data(
        folder / "data.json",
        [
            [user("Who are you?"), answer],
            [user(image(small[2]), what), answer],
            [user(*(image(path) for path in small), what), answer, user("And?"), answer],
            [{"role": "system", "content": "Be brief."}, user(video(clip), what), answer],
            [user(text("Look:"), video(clip) | {"fps": 7, "video_start": 0.3}, what), answer],
            [user(video(frames) | {"fps": 1}, image(small[0]), video(clip), timed, what), answer],
        ],
    )


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, family_data, tiny_folder, tmp_path_factory):
    """A run of each family, with its folder."""
    folder = build_family(request.param, tiny_folder, tmp_path_factory.mktemp(request.param))
    run = helpers.set_up(helpers.tiny_config(train_data=[family_data]), folder)
    run.folder, run.family = folder, request.param
    run.samples = [run.encoder.encode(record) for record in run.records]
    run.micro_batch = pack(run.samples, run.encoder)
    return run


def metadata_of(item) -> VideoMetadata:
    """Return when the frames of a clip are shown, as qwen-vl-utils tells a processor."""
    if "timestamps" in item:  # in seconds, on average 8 / 3 apart
        return VideoMetadata(4 * 8 / 3, 1, frames_indices=item["timestamps"])
    if isinstance(item["video"], list):
        num_frames = len(item["video"]) + len(item["video"]) % 2
        return VideoMetadata(num_frames, item["fps"], frames_indices=list(range(num_frames)))
    return VideoMetadata(**qwen._read_video_decord(item)[1])


def plain_inputs(run, messages, **kwargs) -> dict:
    """Return what the family's own processor and template make of messages; it gets clips read."""
    processor = load_processor(run.folder, run.config)
    items = [item for _, item in media_of(messages)]
    clips = [item for item in items if item["type"] == "video"]
    pictures = [Image.open(item["image"]) for item in items if item["type"] == "image"]
    as_read = {"do_resize": False, "do_sample_frames": False}
    return processor(
        text=[processor.apply_chat_template(messages, tokenize=False, **kwargs)],
        images=pictures or None,
        videos=[load_frames(item, run.encoder.policy) for item in clips] or None,
        videos_kwargs=as_read | {"video_metadata": [metadata_of(item) for item in clips]},
        return_tensors="pt",
    )


def test_samples_equal_what_the_processor_makes(run):
    """Token ids, grids, pixels and positions; and the families do differ in their clips."""
    model = helpers.plain_model(run.folder)
    for record, sample in zip(run.records, run.samples):
        expected = plain_inputs(run, run.encoder.prepare(record))
        assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert run.encoder.measure(record)[0] == len(sample.input_ids)
        parts = sample.patches.split([t * h * w for t, h, w in sample.grids])
        for kind, pixels, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            chosen = [i for i, media_type in enumerate(sample.media_types) if media_type == kind]
            assert bool(chosen) == (pixels in expected)
            if chosen:
                assert [list(sample.grids[i]) for i in chosen] == expected[grids].tolist()
                patches = run.build_inputs.normalize(torch.cat([parts[i] for i in chosen]))
                torch.testing.assert_close(patches, expected[pixels], atol=1e-6, rtol=0)
        position_ids, _ = model.model.get_rope_index(**expected)
        assert torch.equal(position_ids[:, 0], sample.position_ids)

    # The last sample has a list of frames one second apart, a clip with 4 in 1.6 seconds, and a
    # list with two pictures in each of 16 / 3 seconds.
    shown = run.encoder.tokenizer.decode(sample.input_ids)
    times = [t for t in shown.split("<") if t.endswith(" seconds>")]
    steps = sample.position_ids[0][sample.input_ids == run.encoder.video_token_id].unique().diff()
    if run.family in WITH_TIMES_AS_TEXT:
        assert times == [f"{t} seconds>" for t in (0.5, 2.5, 4.5, 0.3, 1.3, 0.5, 7.0)]
    else:
        assert times == []
        # Qwen2.5-VL, here, counts two positions a second.
        expected = {"qwen2_vl": [1, 1, 1], "qwen2_5_vl": [4, 4, 10]}[run.family]
        assert steps[[0, 1, -1]].tolist() == expected


def test_reasoning_is_trained_where_generation_writes_it(run):
    """As Qwen3.5's own template writes it; the others' read none, and refuse it."""
    hm = {"reasoning_content": "Hm.\n"}
    asked, thought = [user("Hi")], [assistant("A.") | hm]
    if run.family != "qwen3_5":
        with pytest.raises(ValueError, match="message 1: .*reads none: .*part of content"):
            run.encoder.prepare({"messages": asked + thought})
        return
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    block, opened = head + "<think>\n\n</think>\n\n", head + "<think>\n"
    plain = [(block, False), ("A.<|im_end|>", True)]
    reasoned = [(opened, False), ("Hm.\n</think>\n\nA.<|im_end|>", True)]
    for answer, pieces in (
        ([assistant(" A.\n")], plain),
        ([assistant("A.") | {"reasoning_content": " "}], plain),
        (thought, reasoned),
        ([assistant("<think>\nHm.\n</think>\n\nA.")], reasoned),
        # The template drops what was thought in earlier turns, and their empty blocks too.
        (
            thought + asked + [assistant("<box>")] + asked + thought,
            [(head, False), ("A.<|im_end|>", True), ("\n" + head, False)]
            + [("<box><|im_end|>", True), ("\n" + opened, False), reasoned[1]],
        ),
    ):
        messages = run.encoder.prepare({"messages": asked + answer})
        assert run.encoder.segments(messages) == [*pieces, ("\n", False)]
    for thinking, prompt in ((False, block), (True, opened)):
        ids = run.encoder.encode_prompt(asked, thinking=thinking).input_ids
        assert run.encoder.tokenizer.decode(ids) == prompt
    assert run.encoder.without_reasoning("Hm.\n</think>\n\nA.") == "A."
    with pytest.raises(ValueError, match="control token <|im_end|>"):
        run.encoder.prepare(
            {"messages": asked + [assistant("") | {"reasoning_content": "<|im_end|>"}]}
        )
    with pytest.raises(ValueError, match="refuses it: No user query"):
        run.encoder.measure({"messages": [{"role": "system", "content": "x"}, assistant("A.")]})


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_packed_equals_alone(run):
    """Logits and gradients, against plain transformers that is given what the processor makes."""
    model = helpers.plain_model(run.folder)
    alone_logits = []
    for record, sample in zip(run.records, run.samples):
        logits = model(**plain_inputs(run, run.encoder.prepare(record))).logits[0, :-1]
        targets = sample.labels[1:]
        F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE).backward()
        alone_logits.append(logits[targets != IGNORE].detach())

    run.model.zero_grad()
    logits = run.model(**run.build_inputs(run.micro_batch)).logits[0]
    F.cross_entropy(logits, run.micro_batch.targets, reduction="sum").backward()
    torch.testing.assert_close(logits, torch.cat(alone_logits), atol=2e-5, rtol=2e-5)
    difference = (gradients(run.model) - gradients(model)).norm() / gradients(model).norm()
    assert difference < 1e-5


def test_the_dummy_segment_reaches_every_parameter_and_changes_none(run):
    run.model.zero_grad()
    micro_batch = pack([], run.encoder)
    assert micro_batch.input_ids.shape == (1, 1)
    logits = run.model(**run.build_inputs(micro_batch)).logits[0]
    F.cross_entropy(logits, micro_batch.targets, reduction="sum").backward()
    assert all(p.grad is not None for p in run.model.parameters())
    assert all(p.grad.count_nonzero() == 0 for p in run.model.parameters())


@pytest.mark.parametrize(
    "part, precision", [("all", "fp32"), ("llm", "fp32"), ("vision", "fp32"), ("all", "bf16_4bit")]
)
def test_adapters_stand_on_the_linear_layers_of_every_family(run, part, precision):
    """B begins at zero, so the gradients of A are; those of B say that each adapter takes part.

    With checkpointing, they are the same whether samples are packed or alone, on any base; with
    all the rest in fp32, to see that.
    """
    flags = {"lora_rank": 4, "train": [part], "gradient_checkpointing": "all"}
    flags |= {"precision": precision, "train_data": run.config.train_data}
    model = helpers.set_up(helpers.tiny_config(**flags), run.folder).model.float()
    packed = []
    for rows in ([run.samples], [[sample] for sample in run.samples]):
        model.zero_grad()
        for row in rows:
            micro_batch = pack(row, run.encoder)
            logits = model(**run.build_inputs(micro_batch)).logits[0]
            F.cross_entropy(logits, micro_batch.targets, reduction="sum").backward()
        packed.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (packed[0] - packed[1]).norm() < 1e-5 * packed[1].norm()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert all(p.grad.count_nonzero() > 0 for name, p in trained.items() if ".lora_B." in name)
    parts = {part_of(name) for name in trained}
    assert parts == ({"llm", "vision", "merger"} if part == "all" else {part})


def test_kernels_of_linear_attention_get_the_ends_of_samples(run, monkeypatch):
    """Stand-ins with the signatures of flash-linear-attention 0.6.0, which has none for a CPU."""
    if run.family != "qwen3_5":
        pytest.skip("has no linear attention")

    def causal_conv1d(x, weight, activation, cu_seqlens, cu_seqlens_cpu):
        assert activation == "silu" and torch.equal(cu_seqlens, cu_seqlens_cpu)
        rows = x.split(segment_lengths(cu_seqlens_cpu), dim=1)
        outputs = [
            modeling_qwen3_5.causal_conv1d_fn(row.mT, weight, activation="silu").mT for row in rows
        ]
        return torch.cat(outputs, dim=1), None

    def chunk_gated_delta_rule(
        q, k, v, g, beta, use_qk_l2norm_in_kernel, cu_seqlens, cu_seqlens_cpu
    ):
        rows = zip(*(x.split(segment_lengths(cu_seqlens_cpu), dim=1) for x in (q, k, v, g, beta)))
        outputs = [
            modeling_qwen3_5.torch_chunk_gated_delta_rule(
                *row, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel
            )[0]
            for row in rows
        ]
        return torch.cat(outputs, dim=1), None

    kernels = (causal_conv1d, chunk_gated_delta_rule)
    monkeypatch.setattr(families, "delta_net_kernels", lambda: kernels)
    layer = run.model.model.language_model.layers[0].linear_attn
    hidden_states = torch.randn(1, 150, 128)
    ends = torch.tensor([0, 70, 71, 150], dtype=torch.int32)
    outputs = [forward(hidden_states, ends, ends) for forward in (layer, layer.forward_by_kernels)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def note_and_attend(
    calls,
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
):
    """Do what kernels of flash attention do; add (is causal, ends of q, ends of k) to `calls`."""
    lengths = cu_seqlens_q.diff().tolist()
    assert cu_seqlens_q.dtype == torch.int32 and isinstance(max_seqlen_q, int)
    assert max_seqlen_q == max_seqlen_k == max(lengths) and sum(lengths) == len(q)
    assert dropout_p == 0 and window_size == (-1, -1)
    calls.append((causal, cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))
    how = {"cu_seq_lens_q": cu_seqlens_q, "scaling": softmax_scale, "is_causal": causal}
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attention.packed_sdpa(None, *rows, None, **how)[0][0]


def stand_in_for_flash(monkeypatch) -> list:
    """Put a stand-in for the kernel of the package flash-attn; return its calls."""
    calls = []
    flash_attn_varlen_func = partial(note_and_attend, calls)
    flash = modeling_flash_attention_utils
    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(flash, "_flash_varlen_fn", flash_attn_varlen_func)
    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", process)
    return calls


def stand_in_for_varlen(monkeypatch) -> list:
    """Put a stand-in for torch's varlen_attn; return its calls."""
    calls = []

    def varlen_attn(q, k, v, *ends, scale, window_size, enable_gqa):
        is_causal = window_size == (-1, 0)
        # None, which is (-1, -1), would go to cuDNN; one as wide as all is none.
        assert is_causal or window_size == ends[2:]
        return note_and_attend(calls, q, k, v, *ends, softmax_scale=scale, causal=is_causal)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    return calls


@pytest.mark.parametrize("name", ["flash_attention_2", "packed_varlen"])
def test_flash_kernels_get_the_ends_of_frames_and_windows(name, run, monkeypatch):
    model = helpers.plain_model(run.folder)
    keep_samples_apart(model)
    if name == "packed_varlen":
        calls = stand_in_for_varlen(monkeypatch)
        attention.register_attention(name)
        model.set_attn_implementation(name)
        hand_over_whole_rows(model.model.visual)
    else:
        calls = stand_in_for_flash(monkeypatch)
        for config in (model.config, model.config.text_config, model.config.vision_config):
            config._attn_implementation = name
    build_inputs = InputBuilder(run.processor, name, torch.device("cpu"))
    with torch.no_grad():
        logits = model(**build_inputs(run.micro_batch)).logits
        expected = run.model(**run.build_inputs(run.micro_batch)).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)

    def ends(lengths):
        return [0, *np.cumsum(lengths).tolist()]

    grids = [grid for sample in run.samples for grid in sample.grids] + [(1, 2, 2)]
    of_frames = ends([h * w for t, h, w in grids for _ in range(t)])
    of_samples = ends([len(sample.input_ids) for sample in run.samples] + [1])
    depth, layers = len(model.model.visual.blocks), model.model.language_model.layers
    num_attentions = sum(hasattr(layer, "self_attn") for layer in layers)
    assert calls[depth:] == [(True, of_samples, of_samples)] * num_attentions
    in_frames = [call == (False, of_frames, of_frames) for call in calls[:depth]]
    num_ends = [len(call[1]) for call in calls[:depth]]
    if run.family == "qwen2_5_vl":  # blocks 0 and 2 attend within windows
        assert in_frames == [False, True, False] and num_ends[0] == num_ends[2] > num_ends[1]
    else:
        assert all(in_frames)


def test_inputs_lie_where_a_gpu_needs_them(run, monkeypatch):
    """With tensors that only claim to be on a GPU: PyTorch checks devices all the same."""

    # Ends of segments stay real: fake ones would have no lengths to read.
    def on_real_tensors(function):
        def run_without_fakes(tensor):
            with unset_fake_temporarily():
                return function(tensor)

        return run_without_fakes

    for name in ("stay_on_cpu", "segment_lengths"):
        monkeypatch.setattr(inputs, name, on_real_tensors(getattr(inputs, name)))
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        with torch.device("cuda"):
            model = AutoModelForImageTextToText.from_config(
                run.model.config, attn_implementation="packed_sdpa"
            )
        hand_over_whole_rows(model.model.visual)
        if run.family != "qwen3_vl":
            model.model.register_forward_pre_hook(place_media, with_kwargs=True)
        keep_samples_apart(model)
        build_inputs = InputBuilder(run.processor, "packed_sdpa", torch.device("cuda"))
        logits = model(**build_inputs(run.micro_batch)).logits
    assert logits.device.type == "cuda" and logits.shape[1] == len(run.micro_batch.targets)


def test_fully_shard_leaves_lengths_on_the_cpu(run):
    """On a GPU it moves all arguments there; layers would fetch these back one by one."""
    inputs = run.build_inputs(run.micro_batch)
    _, (moved,) = _to_kwargs((), inputs, torch.device("meta"), False)
    stay = {name for name, value in moved.items() if getattr(value, "is_cpu", False)}
    expected = {"cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens_cpu"}
    expected |= {"image_cu_seqlens", "image_grid_thw"}
    windows = {"image_cu_window_seqlens"} & set(inputs)
    assert stay == expected | windows


def test_features_are_placed_without_looking_for_their_places(run):
    """On a GPU the host would wait for the answer. The gradients are those of transformers."""
    if run.family == "qwen3_vl":
        pytest.skip("its first decoder layers look for them all the same")
    gradients = []
    for hooks in ({}, run.model.model._forward_pre_hooks):
        with pytest.MonkeyPatch.context() as monkeypatch, profile() as profiler:
            monkeypatch.setattr(run.model.model, "_forward_pre_hooks", hooks)
            logits = run.model(**run.build_inputs(run.micro_batch)).logits
            logits.square().sum().backward()
        gradients.append([p.grad for p in run.model.parameters()])
        run.model.zero_grad()
    called = {event.key for event in profiler.key_averages()}
    assert not called & {"aten::masked_scatter", "aten::masked_select", "aten::nonzero"}
    assert all(map(torch.equal, *gradients))


def test_saved_processor_resizes_as_training_did(run, tmp_path):
    load_processor(run.folder, run.config).save_pretrained(tmp_path)
    processor, policy = AutoProcessor.from_pretrained(tmp_path), run.encoder.policy
    assert processor.tokenizer.padding_side == "left"
    for height, width in ((500, 900), (333, 207), (61, 64)):
        picture = torch.zeros((3, height, width), dtype=torch.uint8)
        grid = processor.image_processor([picture], return_tensors="pt")["image_grid_thw"][0]
        assert tuple(grid.tolist()) == policy.grid(1, *policy.image_size(height, width))
        # Smaller frames than the smallest: see load_processor.
        for num_frames in (2, 40, 400) if height * width > policy.video_min_pixels else ():
            clip = torch.zeros((num_frames, 3, height, width), dtype=torch.uint8)
            made = processor.video_processor([clip], do_sample_frames=False, return_tensors="pt")
            size = policy.frame_size(num_frames, height, width)
            assert tuple(made["video_grid_thw"][0].tolist()) == policy.grid(num_frames, *size)


def test_answers_are_those_of_plain_transformers(run):
    """With the same frames: text, pictures and clips in one batch, against each by itself."""
    conversations = [run.encoder.prepare(record)[:-1] for record in run.records]
    samples = [run.encoder.encode_prompt(messages) for messages in conversations]
    model = helpers.plain_model(run.folder)
    got = generate(model, run.encoder, run.build_inputs, samples, 12)
    for answer, messages in zip(got, conversations):
        inputs = plain_inputs(run, messages, add_generation_prompt=True, enable_thinking=False)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        assert run.encoder.decode_answer(new_tokens[0].tolist()) == answer


def test_a_run_from_the_flags_to_the_answers(run, family_data, tmp_path, capsys):
    output_dir = tmp_path / "out"
    flags = f"--model_name_or_path {run.folder} --train_data {family_data} --batch_size 6".split()
    flags += f"--max_pixels 50176 --video_max_pixels 25088 --output_dir {output_dir}".split()
    flags += "--device cpu --learning_rate 3e-3 --num_epochs 8".split()
    flags += "--max_tokens 600 --num_workers 0".split()
    call(finetune, *flags)
    losses = [row["loss"] for row in helpers.read_metrics(output_dir)]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]

    model = AutoModelForImageTextToText.from_pretrained(output_dir)
    assert model.dtype == torch.bfloat16 and model.config.model_type == run.family
    expected = {"mtp.fc.weight": torch.arange(8.0)} if run.family == "qwen3_5" else {}
    with safe_open(output_dir / "model.safetensors", "pt") as file:
        unread = {name: file.get_tensor(name) for name in file.keys() if "mtp" in name}
    assert unread.keys() == expected.keys()
    assert all(torch.equal(unread[name], expected[name]) for name in unread)
    flags = ("--model_dir", output_dir, "--prompts", family_data, "--max_new_tokens", 8)
    call(test_on_trained_model_by_us, *flags)
    assert capsys.readouterr().out.count("\nanswer: ") == 6


def test_other_models_are_refused(tmp_path):
    sliding = {"use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 2}
    config = {"model_type": "qwen2_5_vl", "text_config": sliding}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="asks for sliding attention: not supported"):
        load_processor(str(tmp_path), helpers.tiny_config())
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="is of type llava; use one of qwen2_vl"):
        load_processor(str(tmp_path), helpers.tiny_config())
