"""The planner against the truth: what the allocator is asked for in a real step."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import check_data
import finetune
from families import build_family
from helpers import CPU, allocator_peak, call, encoder_for, set_up, tiny_config
from util.config import UserError
from util.data.plan import Step
from util.model.tiny import build_config
from util.run import run_main
from util.tools import planner
from util.tools.flops import FlopCounter, peak_flops_of
from util.tools.planner import GIB, plan_memory


@pytest.fixture(scope="module")
def larger_tiny(tiny_folder, tmp_path_factory) -> str:
    """A folder with a model of 8 M parameters and tiny's tokenizer.

    As in real models, the embeddings are by far the largest tensor.
    """
    folder = tmp_path_factory.mktemp("larger")
    config = build_config(encoder_for(tiny_folder).tokenizer)
    config.text_config.vocab_size = 16384
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    transformers.AutoProcessor.from_pretrained(tiny_folder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"gradient_checkpointing": "all", "max_tokens": 700},
        {"precision": "bf16", "gradient_checkpointing": "llm"},
        {"train": ["llm"], "precision": "bf16"},
        {"lora_rank": 8, "gradient_checkpointing": "vision"},
        {"supervise": "all", "lora_rank": 8},  # logits and their fp32 chunks are much of it
        {"family": "qwen3_5"},  # states of linear attention
        {"lora_rank": 8, "precision": "bf16_4bit", "gradient_checkpointing": "all"},
        # Short, so that the step is the peak.
        {"precision": "bf16_lean", "gradient_checkpointing": "all", "batch_size": 1},
    ],
)
def test_the_planned_peak_is_the_real_one(
    flags, mixed_data, tiny_folder, larger_tiny, tmp_path, monkeypatch
):
    flags, folder = {"batch_size": 8, "max_tokens": 2000, "num_workers": 0} | flags, larger_tiny
    if "family" in flags:
        folder = build_family(flags.pop("family"), tiny_folder, tmp_path / "model")
    config = tiny_config(train_data=[mixed_data], output_dir=str(tmp_path), **flags)
    run = set_up(config, folder)
    model_config = transformers.AutoConfig.from_pretrained(folder)
    planned = plan_memory(model_config, run.processor, config, run.data, shard_size=1)
    samples, is_accumulated = planner.largest_micro_batch(run.data, model_config, config)
    steps = run.plan.steps(0, run.plan.num_steps_per_epoch)
    assert samples in [micro_batch for step in steps for micro_batch in step.micro_batches[0]]
    assert is_accumulated == (config.max_tokens == 700)
    # The loop's own step, with the states of an earlier one standing.
    step = Step(0, 0, samples, [[samples] * (1 + is_accumulated)], 1, 1)
    monkeypatch.setattr(run.data.plan, "steps", lambda first, last: [step, step])
    arguments = (config, run.model, run.processor, run.data)
    peak = allocator_peak(lambda: finetune.train(*arguments, None, 10, CPU), run.model)
    assert planned["peak_gib"] * GIB == pytest.approx(peak, rel=0.05)


def test_a_shard_holds_its_part_of_the_states(mixed_data, larger_tiny):
    """Gradients too, also where a step is one micro-batch, which leaves them whole on one GPU."""
    model_config = transformers.AutoConfig.from_pretrained(larger_tiny)
    peaks = []
    for max_tokens in (2000, 700):  # one micro-batch a step, and several
        flags = {"batch_size": 8, "max_tokens": max_tokens, "gradient_checkpointing": "all"}
        config = tiny_config(train_data=[mixed_data], **flags)
        run = set_up(config, larger_tiny)
        one, four = (
            plan_memory(model_config, run.processor, config, run.data, shard_size)
            for shard_size in (1, 4)
        )
        states = ("weights_gib", "gradients_gib", "optimizer_gib")
        for kind in states:
            assert four[kind] == pytest.approx(one[kind] / 4, abs=1e-3)
        working = four["activations_gib"] + four["logits_gib"]
        held = sum(four[kind] for kind in states)
        # In the first micro-batch of a step, no gradients stand yet.
        least = held + working - (four["gradients_gib"] if max_tokens == 2000 else 0)
        assert least - 5e-3 <= four["peak_gib"] <= held + working + 5e-3
        # What is reduced stays beside gradients that stand already.
        peaks.append(working - (four["gradients_gib"] if max_tokens == 700 else 0))
        gathered = 2 * one["weights_gib"]  # the root and blocks, at most
        assert working < one["activations_gib"] + one["logits_gib"] + gathered
    assert peaks[1] < peaks[0]


def test_flops_are_those_that_pytorch_counts(mixed_data, tiny_folder):
    # One image, and the formula's whole square of attention: eager computes it.
    config = tiny_config(train_data=[mixed_data])
    run = set_up(config, tiny_folder)
    i = int(run.index.num_image_tokens.argmax())
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tiny_folder, dtype=torch.float32, attn_implementation="eager"
    )
    sample = run.data.samples[i]
    inputs = {
        "input_ids": sample.input_ids[None],
        "pixel_values": run.build_inputs.normalize(sample.patches),
        "image_grid_thw": torch.tensor(sample.grids),
        "mm_token_type_ids": run.encoder.token_types(sample.input_ids)[None],
        "logits_to_keep": torch.nonzero(sample.labels != -100)[:, 0],
    }
    with FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=False).logits.sum().backward()
    counted = FlopCounter(model, run.index, config)([i])
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_frozen_parts_cost_less(mixed_data, tiny_folder):
    run = set_up(tiny_config(train_data=[mixed_data]), tiny_folder)
    flops = {
        parts: FlopCounter(run.model, run.index, tiny_config(train=[parts]))(range(25))
        for parts in ("all", "llm", "merger")
    }
    assert flops["merger"] < flops["llm"] < flops["all"]


def test_the_planner_prints_json_and_flags_that_fit(mixed_data, capsys):
    def plan_for(gib):
        flags = ("--train_data", mixed_data, "--model_name_or_path", "tiny", "--batch_size", 12)
        call(check_data, *flags, "--plan", gib)
        printed = capsys.readouterr().out
        return printed, json.loads(printed.splitlines()[-1])

    printed, plan = plan_for(24)
    names = ("weights", "gradients", "optimizer", "activations", "logits", "peak")
    assert set(plan) == {*(f"{name}_gib" for name in names), "fits"}
    assert plan["fits"] and "compute:" in printed
    printed, plan = plan_for(0.9 * plan["peak_gib"])
    assert not plan["fits"]
    assert "with --gradient_checkpointing all: 0." in printed


def test_what_cannot_fit_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    memory = SimpleNamespace()
    monkeypatch.setattr(planner.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(finetune, "load_model", None)
    flags = ("--model_name_or_path", "tiny", "--device", "cpu", "--output_dir", tmp_path / "out")
    memory.available = 30 * 2**20
    with pytest.raises(UserError, match=r"(?s)take .* GiB.*--lora_rank 64"):
        call(finetune, *flags)
    # An adapter keeps its rank.
    memory.available = 8 * 2**20
    words = r"fit:\n  --gradient_checkpointing all --precision bf16_4bit: 0.0 GiB\nWith"
    with pytest.raises(UserError, match=words):
        call(finetune, *flags, "--lora_rank", 4)


def test_out_of_memory_says_what_to_do():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(SystemExit, match=r"(?s)--gradient_checkpointing all.*--plan.*2.00 GiB"):
        run_main(main)


def test_gpus_are_known_by_the_names_that_the_driver_gives():
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A10G": 70e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA RTX 6000 Ada Generation": 364e12,
        "NVIDIA RTX A6000": 154.8e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA GH200 480GB": 989e12,
        "Some RTX": None,
    }
    assert {name: peak_flops_of(name) for name in names} == names
