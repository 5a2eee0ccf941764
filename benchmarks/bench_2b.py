"""One training step of the real Qwen2-VL-2B shape on this machine: memory and seconds.

    python -m benchmarks.bench_2b                  # on a CPU it takes some 20 minutes and 24 GB
    python -m benchmarks.bench_2b --device cuda

Random weights of the published shape, one sample of 1,024 tokens of which 576 are of an image. The
second step is measured: the first one compiles the 8-bit optimizer. Peak: what PyTorch's allocator
had handed out at most, on a CPU as torch.profiler counts it; resident: of the process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
import transformers
from torch.profiler import ProfilerActivity, profile

from util.config import Config, fill_defaults
from util.data.batch import MicroBatch, PlannedData, pack
from util.data.index import Index
from util.data.plan import Plan
from util.data.sample import IGNORE, Sample
from util.model.attention import choose_attention, register_attention
from util.model.inputs import InputBuilder
from util.model.load import build_encoder, find_model, load_processor
from util.model.loss import cross_entropy_sum
from util.model.parts import choose_autocast, init_lora, prepare_for_training
from util.optim import build_optimizer, set_learning_rate
from util.tools.flops import FlopCounter, peak_flops, published_config
from util.tools.planner import plan_memory

NUM_TOKENS, SIDE, NUM_SUPERVISED = 1024, 672, 99  # 672 x 672 pixels are 24 x 24 tokens
GIB = 2**30
NAME = "Qwen/Qwen2-VL-2B-Instruct"
LEAN = {"precision": "bf16_lean", "gradient_checkpointing": "all"}
VARIANTS = {
    "full, bf16_lean": {"precision": "bf16_lean"},
    "full, bf16_lean, checkpointing": LEAN,
    "llm only, bf16_lean, checkpointing": LEAN | {"train": ["llm"]},
    "LoRA 64, bf16_lean, checkpointing": LEAN | {"lora_rank": 64},
    "full, bf16, checkpointing": {"precision": "bf16", "gradient_checkpointing": "all"},
    "the original's way: fp32 weights, autocast, all logits": {"precision": "bf16"},
}
ORIGINAL = list(VARIANTS)[-1]


class OneSample:
    """Stands for a data set of the one sample."""

    def __init__(self, sample: Sample, encoder):
        self.sample, self.encoder = sample, encoder

    def __getitem__(self, i: int) -> Sample:
        return self.sample

    def collate(self, samples: list[Sample]) -> MicroBatch:
        return pack(samples, self.encoder)


def make_data(config: Config):
    """Return processor, the configuration of the model, and data of one sample."""
    folder = find_model("tiny")
    processor = load_processor(folder, config)
    encoder = build_encoder(folder, processor, config)
    picture = encoder.media_token_ids  # control tokens: nowhere in the text
    side = SIDE // encoder.policy.patch_size
    num_image_tokens = (side // encoder.policy.merge_size) ** 2
    num_text = NUM_TOKENS - num_image_tokens - encoder.num_dummy_tokens
    text = torch.tensor([i for i in range(200) if i not in picture]).repeat(3)[:num_text]
    input_ids = torch.cat([torch.full((num_image_tokens,), encoder.image_token_id), text])
    labels = torch.full_like(input_ids, IGNORE)
    labels[-NUM_SUPERVISED:] = input_ids[-NUM_SUPERVISED:]
    grid = (1, side, side)
    patches = torch.randint(0, 256, (side**2, encoder.policy.patch_dim), dtype=torch.uint8)
    positions = encoder.positions(input_ids, [grid], ["image"], [])
    sample = Sample(input_ids, labels, positions, patches, [grid], ["image"], [])
    row = [[len(input_ids)], [NUM_SUPERVISED], [num_image_tokens], [0], [side**4]]
    index = Index(*torch.tensor(row).numpy())
    plan = Plan(index, 1, NUM_TOKENS, 0, 1)
    own = transformers.AutoConfig.from_pretrained(folder)
    model_config = published_config(NAME)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id"):
        setattr(model_config, name, getattr(own, name))
    return processor, model_config, PlannedData(OneSample(sample, encoder), index, plan, "", [])


def make_model(model_config, config: Config, attention: str, device: torch.device):
    """Return a model with random weights, prepared for training; one copy at any time."""
    register_attention(attention)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            model_config, dtype=torch.float32, attn_implementation=attention
        )
    prepare_for_training(model, config)
    # Tables of the rotary embeddings are computed, not trained.
    tables = {
        part: type(part)(part.config)
        for part in (model.model.language_model.rotary_emb, model.model.visual.rotary_pos_emb)
    }
    model.to_empty(device=device)
    model.tie_weights()
    for part, table in tables.items():
        for name, buffer in part.named_buffers():
            buffer.copy_(table.get_buffer(name))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
    init_lora(model, 0)
    return model.train()


def original_loss(model, inputs: dict, micro_batch: MicroBatch):
    """Return a loss as the original computes it: logits of all positions, and their fp32 copy."""
    labels = torch.full(
        (micro_batch.input_ids.shape[1],), IGNORE, device=inputs["input_ids"].device
    )
    labels[micro_batch.supervised_positions] = micro_batch.targets.to(labels.device)
    inputs = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
    logits = model(**inputs).logits.float()
    return F.cross_entropy(logits[0], labels, ignore_index=IGNORE)


def allocator_peak(step, model, optimizer) -> int:
    """Return the bytes that PyTorch's allocator had handed out at most on the CPU during `step()`.

    Weights, and moments of an earlier step, count.
    """
    moments = [value for state in optimizer.state.values() for value in state.values()]
    standing = [*model.parameters()]
    for tensor in moments:  # those of torchao are made of several tensors
        attributes = getattr(tensor, "tensor_attrs", None)
        standing += [getattr(tensor, name) for name in attributes] if attributes else [tensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in standing}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = sum(storage.nbytes() for storage in storages.values())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(variant: str, device: torch.device) -> dict:
    """Run two steps; return peak and resident GiB, and seconds of the second one's parts."""
    config = fill_defaults(Config(model_name_or_path=NAME, **VARIANTS[variant]), device.type)
    processor, model_config, data = make_data(config)
    planned = plan_memory(model_config, processor, config, data, shard_size=1)
    attention = choose_attention(device, config.precision)
    model = make_model(model_config, config, attention, device)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    build_inputs = InputBuilder(processor, attention, device)
    micro_batch = data.samples.collate([data.samples[0]])
    autocast, seconds = choose_autocast(device, config.precision), {}

    def timed(name, function):
        started = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] = time.perf_counter() - started
        return result

    def forward():
        inputs = build_inputs(micro_batch)
        with autocast:
            if variant == ORIGINAL:
                return original_loss(model, inputs, micro_batch)
            logits = model(**inputs).logits
        return cross_entropy_sum(logits, micro_batch.targets.to(device)) / NUM_SUPERVISED

    def step():
        loss = timed("forward", forward)
        timed("backward", loss.backward)
        timed("clip", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        timed("optimizer", optimizer.step)
        optimizer.zero_grad(set_to_none=True)

    step()
    result = {"planned": planned["peak_gib"]}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        result["peak"] = torch.cuda.max_memory_allocated(device) / GIB
    else:
        result["peak"] = allocator_peak(step, model, optimizer) / GIB
    result["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    total = sum(seconds.values())
    flops = FlopCounter(model, data.index, config)([0])
    result["tflops"] = flops / total / 1e12
    peak_of_device = peak_flops(device)
    result["mfu"] = flops / total / peak_of_device if peak_of_device else None
    return result | seconds | {"seconds": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="a part of the name of the variants to run")
    parser.add_argument("--variant", help="measure one in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, torch.device(arguments.device))))
        return
    print(f"{NAME}, random weights, {NUM_TOKENS} tokens, 576 of an image, on {arguments.device}\n")
    print(
        "| variant | planned GiB | peak GiB | resident GiB | forward s | backward s | clip s |",
        end="",
    )
    print(" optimizer s | seconds | TFLOP/s | MFU |\n|" + "---|" * 11, flush=True)
    for variant in VARIANTS:
        if arguments.only and arguments.only not in variant:
            continue
        command = [sys.executable, "-m", "benchmarks.bench_2b", "--variant", variant]
        command += ["--device", arguments.device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            reason = lines[-1][:100] if lines and done.returncode > 0 else "killed: out of memory"
            print(f"| {variant} | {reason} |" + " |" * 9, flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        names = ("planned", "peak", "resident", "forward", "backward", "clip", "optimizer")
        cells = [f"{row[name]:.2f}" for name in (*names, "seconds", "tflops")]
        cells.append("" if row["mfu"] is None else f"{row['mfu']:.1%}")
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
