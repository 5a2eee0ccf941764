"""What only a GPU can show; all of it is skipped without one."""

import shutil

import pytest
import torch
import transformers
from transformers.utils import is_flash_attn_2_available

from helpers import autocast, encoder_for, read_metrics, run_script, set_up, tiny_config
from util.data.batch import pack
from util.model import load
from util.model.inputs import InputBuilder
from util.model.load import load_model
from util.model.loss import cross_entropy_sum
from util.optim import build_optimizer
from util.tools.planner import GIB, largest_micro_batch, plan_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda", 0)


def train(data, output_dir, *more):
    """Run finetune.py on mixed data; return the losses and gradient norms of its steps."""
    flags = ["--model_name_or_path", "tiny", "--train_data", data, "--batch_size", 8]
    flags += ["--max_tokens", 400, "--num_epochs", 3, "--output_dir", output_dir]
    run_script("finetune.py", *flags, *more)
    rows = read_metrics(output_dir)
    assert [row["global_step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows]


def test_fp32_on_a_gpu_follows_the_cpu(mixed_data, tmp_path):
    flags = ("--precision", "fp32", "--max_steps", 5)
    losses, norms = train(mixed_data, tmp_path / "gpu", *flags, "--device", "cuda")
    expected, expected_norms = train(mixed_data, tmp_path / "cpu", *flags, "--device", "cpu")
    assert losses == pytest.approx(expected, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "bf16_lean"])
def test_bf16_on_a_gpu_begins_as_fp32_does(precision, mixed_data, tmp_path):
    flags = ("--max_steps", 3, "--device", "cuda", "--learning_rate", 1e-4)
    losses, _ = train(mixed_data, tmp_path / "half", *flags, "--precision", precision)
    expected, _ = train(mixed_data, tmp_path / "full", *flags, "--precision", "fp32")
    assert losses == pytest.approx(expected, rel=0.02)


def test_4_bits_on_a_gpu_begin_as_on_the_cpu(mixed_data, tmp_path):
    flags = ("--max_steps", 3, "--precision", "bf16_4bit", "--lora_rank", 8)
    losses, _ = train(mixed_data, tmp_path / "gpu", *flags, "--device", "cuda")
    expected, _ = train(mixed_data, tmp_path / "cpu", *flags, "--device", "cpu")
    assert losses == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_lean"])
def test_a_run_on_a_gpu_is_resumed(precision, mixed_data, tmp_path):
    """To 1e-3, not to the last bit: kernels may add in another order."""
    flags = ("--precision", precision, "--max_steps", 8, "--save_steps", 4, "--device", "cuda")
    straight, _ = train(mixed_data, tmp_path / "out", *flags)
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    (tmp_path / "out" / "model.safetensors").unlink()
    resumed, _ = train(mixed_data, tmp_path / "out", *flags, "--resume_from", "latest")
    assert resumed == pytest.approx(straight, rel=1e-2 if precision == "bf16_lean" else 1e-3)


@pytest.mark.parametrize("name", ["packed_varlen", "flash_attention_2"])
def test_flash_kernels_give_what_packed_sdpa_gives(name, mixed_data, tiny_folder, monkeypatch):
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("needs flash-attn")
    run = set_up(tiny_config(train_data=[mixed_data]), tiny_folder)
    micro_batch = pack([run.data.samples[i] for i in range(6)], encoder_for(tiny_folder))
    logits = []
    for attention in ("packed_sdpa", name):
        monkeypatch.setattr(load, "choose_attention", lambda *_, name=attention: name)
        model = load_model(tiny_folder, CUDA, tiny_config(precision="bf16")).eval()
        build_inputs = InputBuilder(run.processor, attention, CUDA)
        with torch.no_grad(), autocast(CUDA, "bf16"):
            logits.append(model(**build_inputs(micro_batch)).logits.float())
    assert (logits[0] - logits[1]).abs().max() < 0.02 * logits[0].abs().max()


PLANNED = [
    {},
    {"gradient_checkpointing": "all"},
    {"lora_rank": 8},
    {"lora_rank": 8, "precision": "bf16_4bit"},
]


@pytest.mark.parametrize("flags", PLANNED)
def test_the_planned_peak_is_that_of_the_gpu(flags, mixed_data, tiny_folder):
    """In bf16; within 5 % and 4 MiB, without the workspaces of cuBLAS, which depend on the card.

    tests/nullgpu calls it too.
    """
    flags = {"precision": "bf16", "batch_size": 8, "max_tokens": 2000} | flags
    config = tiny_config(train_data=[mixed_data], **flags)
    run = set_up(config, tiny_folder)
    model_config = transformers.AutoConfig.from_pretrained(tiny_folder)
    planned = plan_memory(model_config, run.processor, config, run.data, shard_size=1)
    samples, is_accumulated = largest_micro_batch(run.data, model_config, config)
    micro_batch = run.data.samples.collate([run.data.samples[i] for i in samples])
    torch.cuda.empty_cache()
    # cuBLAS takes a workspace in each thread, on an H100 of 32 MiB: autograd has one of its own.
    square = torch.ones((8, 8), device=CUDA, requires_grad=True)
    (square @ square).sum().backward()
    before = torch.cuda.memory_allocated(CUDA)
    model = load_model(tiny_folder, CUDA, config).train()
    optimizer = build_optimizer(model, config)
    build_inputs = InputBuilder(run.processor, model.config._attn_implementation, CUDA)
    for _ in range(2):  # the second one has the optimizer's state
        torch.cuda.reset_peak_memory_stats(CUDA)
        for _ in range(1 + is_accumulated):
            with autocast(CUDA, "bf16"):
                logits = model(**build_inputs(micro_batch)).logits
            loss_sum = cross_entropy_sum(logits, micro_batch.targets.to(CUDA))
            del logits
            loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated(CUDA) - before
    assert abs(planned["peak_gib"] * GIB - peak) < 0.05 * peak + 4 * 2**20
