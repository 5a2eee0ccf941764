"""Packed, padded and one-by-one training steps compared, and two ways to get the loss.

    python -m benchmarks.bench_step

Every row runs in a process of its own, one after the other, on the same samples: 16 of 60 to 900
tokens, most with a picture. Memory is the peak of resident memory above what the process held
before its first step. A model of 25 M parameters, fp32, CPU; the second table has the vocabulary
of Qwen2-VL.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from util.config import Config, fill_defaults
from util.data.batch import pack
from util.data.sample import IGNORE
from util.model.attention import hand_over_whole_rows, register_attention
from util.model.inputs import InputBuilder
from util.model.load import build_encoder, find_model, load_processor
from util.model.tiny import build_config

STEPS = 3
VOCAB_SIZE = 151_936
CPU = torch.device("cpu")


def make_samples(folder: Path):
    """Return 16 samples, the encoder and the processor of the tiny model."""
    name = find_model("tiny")
    config = fill_defaults(Config(model_name_or_path="tiny", max_pixels=400 * 784), "cpu")
    processor = load_processor(name, config)
    encoder = build_encoder(name, processor, config)
    generator = np.random.default_rng(0)
    samples = []
    for i in range(16):
        content = [{"type": "text", "text": "What is it? " * int(generator.integers(2, 40))}]
        if i % 4:
            side = int(generator.integers(3, 24)) * 28
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            content.insert(0, {"type": "image", "image": str(folder / f"{i}.png")})
        answer = "It is a cat. " * int(generator.integers(2, 12))
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        samples.append(encoder.encode({"messages": messages}))
    return samples, encoder, processor


def make_model(encoder, attention: str):
    """Return a Qwen2-VL of 25 M parameters with random weights."""
    import transformers

    register_attention(attention)
    config = build_config(encoder.tokenizer)
    config.text_config.hidden_size = config.vision_config.hidden_size = 512
    config.text_config.num_attention_heads = 8
    config.text_config.num_key_value_heads = 4
    config.text_config.intermediate_size = 1408
    config.text_config.num_hidden_layers = 6
    config.text_config.layer_types = ["full_attention"] * 6
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).train()
    if attention == "packed_sdpa":
        hand_over_whole_rows(model.model.visual)
    return model


def packed_step(model, samples, encoder, build_inputs, max_tokens=2048):
    """Forward and backward of the samples in packed rows of at most `max_tokens`."""
    rows, free = [[]], max_tokens
    for sample in sorted(samples, key=lambda s: -len(s.input_ids)):
        if len(sample.input_ids) >= free:
            rows, free = [*rows, []], max_tokens
        rows[-1].append(sample)
        free -= len(sample.input_ids)
    for row in rows:
        micro_batch = pack(row, encoder)
        logits = model(**build_inputs(micro_batch)).logits[0]
        F.cross_entropy(logits, micro_batch.targets, reduction="sum").backward()


def padded_step(model, samples, encoder, build_inputs, rows=4):
    """Forward and backward of the samples in padded batches of `rows`."""
    for start in range(0, len(samples), rows):
        chosen = samples[start : start + rows]
        input_ids = pad_sequence([s.input_ids for s in chosen], batch_first=True)
        lengths = torch.tensor([len(s.input_ids) for s in chosen])
        labels = pad_sequence([s.labels for s in chosen], batch_first=True, padding_value=IGNORE)
        positions = pad_sequence([s.position_ids.T for s in chosen], batch_first=True)
        grids = [grid for s in chosen for grid in s.grids]
        hidden = model.model(
            input_ids=input_ids,
            attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            position_ids=positions.permute(2, 0, 1),
            pixel_values=build_inputs.normalize(torch.cat([s.patches for s in chosen]))
            if grids
            else None,
            image_grid_thw=torch.tensor(grids) if grids else None,
            use_cache=False,
        ).last_hidden_state
        supervised = labels[:, 1:] != IGNORE
        logits = model.lm_head(hidden[:, :-1][supervised])
        F.cross_entropy(logits, labels[:, 1:][supervised], reduction="sum").backward()


def measure_training(variant: str) -> dict:
    """Return tokens per second and the peak memory of one way to run a step."""
    with tempfile.TemporaryDirectory() as folder:
        samples, encoder, processor = make_samples(Path(folder))
    attention = "packed_sdpa" if variant == "packed" else "sdpa"
    model = make_model(encoder, attention)
    build_inputs = InputBuilder(processor, attention, CPU)
    step, options = {
        "packed": (packed_step, {}),
        "padded": (padded_step, {}),
        "one by one": (padded_step, {"rows": 1}),
    }[variant]
    idle = resident_gib()
    step(model, samples, encoder, build_inputs, **options)
    started = time.perf_counter()
    for _ in range(STEPS):
        model.zero_grad()
        step(model, samples, encoder, build_inputs, **options)
    seconds = (time.perf_counter() - started) / STEPS
    num_tokens = sum(len(s.input_ids) for s in samples)
    return {"seconds": seconds, "tokens": num_tokens / seconds, "gib": resident_gib() - idle}


def measure_logits(variant: str) -> dict:
    """Return time and peak memory of the path from hidden states to their gradients."""
    num_tokens, hidden_size = 2048, 256
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(hidden_size, VOCAB_SIZE, bias=False)
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    labels = torch.randint(0, VOCAB_SIZE, (num_tokens,))
    labels[torch.randperm(num_tokens)[num_tokens // 4 :]] = IGNORE
    lm_head.weight.grad = torch.zeros_like(lm_head.weight)
    idle = resident_gib()
    started = time.perf_counter()
    if variant == "all positions":
        logits = lm_head(hidden).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    else:
        supervised = torch.nonzero(labels != IGNORE)[:, 0]
        logits = lm_head(hidden[supervised]).float()
        loss = F.cross_entropy(logits, labels[supervised], reduction="sum")
    loss.backward()
    return {"seconds": time.perf_counter() - started, "gib": resident_gib() - idle}


def resident_gib() -> float:
    """Return the peak of this process's resident memory so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_alone(function: str, variant: str) -> dict:
    """Run a measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_step", function, variant]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def main() -> None:
    print("| step | tokens/s | seconds | peak GiB |\n|---|---|---|---|")
    for variant in ("packed", "padded", "one by one"):
        row = run_alone("measure_training", variant)
        print(f"| {variant} | {row['tokens']:,.0f} | {row['seconds']:.2f} | {row['gib']:.2f} |")
    print("\n| logits, a quarter of 2,048 tokens supervised | seconds | peak GiB |\n|---|---|---|")
    for variant in ("all positions", "supervised positions"):
        row = run_alone("measure_logits", variant)
        print(f"| {variant} | {row['seconds']:.2f} | {row['gib']:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
    else:
        main()
