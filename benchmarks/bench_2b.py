"""One training step of the real Qwen2-VL-2B shape on this machine: memory and seconds.

    python -m benchmarks.bench_2b                  # on a CPU it takes some 20 minutes and 24 GB
    python -m benchmarks.bench_2b --device cuda
    python -m benchmarks.bench_2b --only LoRA      # variants with this in their name

Random weights of the published shape, one sample of 1,024 tokens of which 576 are of an image. The
second step is measured: the first one makes the moments. Peak: what PyTorch's allocator
had handed out at most, on a CPU as torch.profiler counts it; resident: of the process.
"""

import argparse
import json
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import print_header, print_row, resident_gib, run_alone
from check_data import load_for_plan
from util.config import Config, fill_defaults
from util.data.batch import prepare_data
from util.model.attention import choose_attention, register_attention
from util.model.inputs import InputBuilder
from util.model.loss import cross_entropy_sum
from util.model.parts import init_lora, prepare_for_training
from util.optim import build_optimizer, set_learning_rate
from util.tools.planner import GIB, plan_memory

NUM_TOKENS, SIDE, NUM_SUPERVISED = 1024, 672, 99  # 672 x 672 pixels are 24 x 24 tokens
NAME = "Qwen/Qwen2-VL-2B-Instruct"
LEAN = {"precision": "bf16_lean", "gradient_checkpointing": "all"}
VARIANTS = {
    "full, bf16_lean": {"precision": "bf16_lean"},
    "full, bf16_lean, checkpointing": LEAN,
    "llm only, bf16_lean, checkpointing": LEAN | {"train": ["llm"]},
    "LoRA 64, bf16_lean, checkpointing": LEAN | {"lora_rank": 64},
    "full, bf16, checkpointing": {"precision": "bf16", "gradient_checkpointing": "all"},
}
MEMORY, PARTS = ("planned", "peak", "resident"), ("forward", "backward", "optimizer")


def write_data(folder: Path, encoder) -> str:
    """Write a data file of one sample, which with the dummy segment has NUM_TOKENS."""
    Image.effect_noise((SIDE, SIDE), 50).save(folder / "noise.png")

    def record(num_digits: int) -> dict:  # a digit is a token
        content = [{"type": "image", "image": "noise.png"}]
        content.append({"type": "text", "text": "7" * num_digits})
        answer = {"role": "assistant", "content": "7" * (NUM_SUPERVISED - 1)}  # and <|im_end|>
        return {"messages": [{"role": "user", "content": content}, answer]}

    missing = NUM_TOKENS - encoder.num_dummy_tokens - encoder.measure(record(0), folder)[0]
    (folder / "data.json").write_text(json.dumps([record(missing)]))
    return str(folder / "data.json")


def make_model(model_config, config: Config, attention: str, device: torch.device):
    """Return a model with random weights, prepared for training; one copy at any time."""
    register_attention(attention)
    dtype = torch.bfloat16 if config.precision == "bf16_lean" else torch.float32
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(
            model_config, dtype=dtype, attn_implementation=attention
        )
    prepare_for_training(model, config)
    init_lora(model, config.seed)
    return model.train()


def allocator_peak(step, model, optimizer) -> int:
    """Return the bytes that PyTorch's allocator had handed out at most on the CPU during `step()`.

    Weights, and moments of an earlier step, count.
    """
    moments = [value for state in optimizer.state.values() for value in state.values()]
    standing = [*model.parameters(), *moments]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in standing}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = sum(storage.nbytes() for storage in storages.values())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(variant: str, device_name: str) -> dict:
    """Run two steps; return peak and resident GiB, and seconds of the second one's parts."""
    device = torch.device(device_name)
    flags = {"model_name_or_path": NAME, "max_tokens": NUM_TOKENS, "max_pixels": SIDE**2}
    config = fill_defaults(Config(**flags, batch_size=1, **VARIANTS[variant]), device.type)
    processor, encoder, model_config = load_for_plan(config)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_data([write_data(Path(folder), encoder)], encoder, config)
        micro_batch = data.samples.collate([data.samples[0]])
        planned = plan_memory(model_config, processor, config, data, shard_size=1)
    assert micro_batch.input_ids.numel() == NUM_TOKENS
    assert len(micro_batch.targets) == NUM_SUPERVISED
    attention = choose_attention(device, config.precision)
    model = make_model(model_config, config, attention, device)
    build_inputs = InputBuilder(processor, attention, device)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0, 1, config)
    is_bf16, seconds = config.precision == "bf16", {}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_bf16, cache_enabled=False)

    @contextmanager
    def timed(part: str):
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[part] = time.perf_counter() - started

    def step():
        with timed("forward"), autocast:
            logits = model(**build_inputs(micro_batch)).logits
        with timed("backward"):
            loss = cross_entropy_sum(logits, micro_batch.targets.to(device)) / NUM_SUPERVISED
            del logits
            loss.backward()
        with timed("optimizer"):
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = allocator_peak(step, model, optimizer)
    memory = {"planned": planned["peak_gib"], "peak": peak / GIB, "resident": resident_gib()}
    return memory | seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="a part of the name of the variants to run")
    arguments = parser.parse_args()
    print(f"{NAME}, random weights, {NUM_TOKENS} tokens, 576 of an image, on {arguments.device}\n")
    print_header("variant", *(f"{name} GiB" for name in MEMORY), *PARTS, "seconds")
    for variant in VARIANTS:
        if arguments.only not in variant:
            continue
        row = run_alone("bench_2b.measure", variant, arguments.device)
        if "error" in row:
            print_row(variant, row["error"], *[""] * 6)
        else:
            seconds = [row[part] for part in PARTS]
            print_row(variant, *(row[name] for name in MEMORY), *seconds, sum(seconds))


if __name__ == "__main__":
    main()
