"""The planner against the truth: what the allocator is asked for in a real step."""

import json

import pytest
import torch
import transformers
from conftest import CPU, encoder_for, set_up, tiny_config
from torch.utils.flop_counter import FlopCounterMode

import check_data
import finetune
import util.tools.planner
from benchmarks.bench_2b import allocator_peak
from util.config import UserError
from util.data.plan import Plan
from util.model.load import load_model
from util.model.loss import cross_entropy_sum
from util.model.parts import choose_autocast
from util.model.tiny import build_config
from util.optim import build_optimizer
from util.run import run_main
from util.tools.flops import FlopCounter, peak_flops_of
from util.tools.planner import GIB, plan_memory


@pytest.fixture(scope="module")
def larger_tiny(tiny_folder, tmp_path_factory) -> str:
    """A folder with a model of 34 M parameters and tiny's tokenizer.

    As in real models, the embeddings are by far the largest tensor.
    """
    folder = tmp_path_factory.mktemp("larger")
    config = build_config(encoder_for(tiny_folder).tokenizer)
    config.text_config.vocab_size = 16384
    config.text_config.hidden_size = config.vision_config.hidden_size = 512
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 8, 4
    config.text_config.intermediate_size = 1408
    config.text_config.num_hidden_layers = 6
    config.text_config.layer_types = ["full_attention"] * 6
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    transformers.AutoProcessor.from_pretrained(tiny_folder).save_pretrained(folder)
    return str(folder)


def real_step(run, samples, num_micro_batches):
    """Return the peak of an optimizer step, with the states of an earlier one standing."""
    optimizer = build_optimizer(run.model, run.config)
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    run.model.train()

    def step():
        for _ in range(num_micro_batches):
            micro_batch = run.data.samples.collate([run.data.samples[i] for i in samples])
            with choose_autocast(CPU, run.config.precision):
                logits = run.model(**run.build_inputs(micro_batch)).logits
            loss_sum = cross_entropy_sum(logits, micro_batch.targets)
            del logits
            loss_sum.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return allocator_peak(step, run.model, optimizer)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"gradient_checkpointing": "all", "max_tokens": 700},
        {"precision": "bf16", "gradient_checkpointing": "llm"},
        {"train": ["llm"], "precision": "bf16"},
        {"lora_rank": 8, "gradient_checkpointing": "vision"},
        {"supervise": "all", "lora_rank": 8},  # logits and their fp32 chunks are much of it
        # Slow: torchao compiles its step. Short, so that the step is the peak.
        pytest.param(
            {"precision": "bf16_lean", "gradient_checkpointing": "all", "batch_size": 1},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_planned_peak_is_the_real_one(flags, mixed_data, larger_tiny):
    folder = larger_tiny
    config = tiny_config(train_data=[mixed_data], **({"batch_size": 8, "max_tokens": 2000} | flags))
    run = set_up(config, folder)
    model_config = transformers.AutoConfig.from_pretrained(folder)
    planned = plan_memory(model_config, run.processor, config, run.data, shard_size=1)
    samples, is_accumulated = util.tools.planner.largest_micro_batch(run.data, model_config, config)
    assert is_accumulated == (config.max_tokens == 700)
    peak = real_step(run, samples, 1 + is_accumulated)
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
        for kind in ("weights_gib", "gradients_gib", "optimizer_gib"):
            assert four[kind] == pytest.approx(one[kind] / 4, abs=1e-3)
        states = 4 * four["weights_gib"] + 4 * four["gradients_gib"] + 4 * four["optimizer_gib"]
        working = four["activations_gib"] + four["logits_gib"]
        assert four["peak_gib"] == pytest.approx(states / 4 + working, abs=5e-3)
        peaks.append(working)
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


def test_the_largest_micro_batch_is_planned(mixed_data, tiny_folder):
    config = tiny_config(train_data=[mixed_data], batch_size=4, max_tokens=700)
    run = set_up(config, tiny_folder)
    model_config = transformers.AutoConfig.from_pretrained(tiny_folder)
    largest, _ = util.tools.planner.largest_micro_batch(run.data, model_config, config)
    plan = Plan(run.index, 4, run.plan.capacity, 0, 1)
    every = [m for step in plan.steps(0, plan.num_steps_per_epoch) for m in step.micro_batches[0]]
    assert largest in every


def run_check(monkeypatch, capsys, *flags) -> dict:
    monkeypatch.setattr("sys.argv", ["check_data.py", *map(str, flags)])
    check_data.main()
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


def test_the_planner_prints_json_and_flags_that_fit(mixed_data, monkeypatch, capsys):
    flags = ("--train_data", mixed_data, "--model_name_or_path", "tiny", "--batch_size", 12)
    printed, plan = run_check(monkeypatch, capsys, *flags, "--plan", 24)
    names = ("weights", "gradients", "optimizer", "activations", "logits", "peak")
    assert set(plan) == {*(f"{name}_gib" for name in names), "fits"}
    assert plan["fits"]
    assert "compute:" in printed
    printed, plan = run_check(monkeypatch, capsys, *flags, "--plan", 0.9 * plan["peak_gib"])
    assert not plan["fits"]
    assert "with --gradient_checkpointing all: 0." in printed


def test_what_cannot_fit_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        util.tools.planner.psutil, "virtual_memory", lambda: type("", (), {"available": 30 * 2**20})
    )
    monkeypatch.setattr(finetune, "load_model", None)
    flags = ("--model_name_or_path", "tiny", "--device", "cpu", "--output_dir", tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["finetune.py", *map(str, flags)])
    with pytest.raises(UserError, match=r"(?s)0.1 GiB.*--lora_rank 64"):
        finetune.main()


def test_out_of_memory_says_what_to_do():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(SystemExit, match=r"(?s)--gradient_checkpointing all.*--plan.*2.00 GiB"):
        run_main(main)


def test_tiny_has_room(tiny_folder):
    util.tools.planner.check_fits(tiny_folder, tiny_config(), CPU, shard_size=1)
    assert load_model(tiny_folder, "packed_sdpa", CPU, tiny_config()) is not None


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
