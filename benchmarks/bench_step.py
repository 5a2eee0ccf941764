"""Packed, padded and one-by-one training steps compared, and two ways to get the loss.

    python -m benchmarks.bench_step

Every row runs in a process of its own, one after the other, on the same samples: 16 of 60 to 900
tokens, most with a picture. Memory is the peak of resident memory above what the process held
before its first step. A model of 25 M parameters, fp32, CPU; the second table has the vocabulary
of Qwen2-VL.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import load_tiny, print_header, print_row, resident_gib, run_alone
from util.data.batch import pack, prepare_data
from util.data.sample import IGNORE
from util.model.attention import hand_over_whole_rows, register_attention
from util.model.inputs import InputBuilder
from util.model.tiny import build_config

NUM_STEPS, NUM_SAMPLES = 3, 16
VOCAB_SIZE = 151_936


def write_data(folder: Path) -> str:
    """Write a data file of samples of mixed length and return its path."""
    generator, records = np.random.default_rng(0), []
    for i in range(NUM_SAMPLES):
        content = [{"type": "text", "text": "What is it? " * int(generator.integers(2, 40))}]
        if i % 4:
            side = int(generator.integers(3, 24)) * 28
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            content.insert(0, {"type": "image", "image": f"{i}.png"})
        answer = "It is a cat. " * int(generator.integers(2, 12))
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        records.append({"messages": messages})
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json")


def make_model(encoder, attention: str):
    """Return a Qwen2-VL of 25 M parameters with random weights."""
    register_attention(attention)
    config = build_config(encoder.tokenizer)
    config.vision_config.hidden_size = 512
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    layers = {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}
    config.text_config.update({"hidden_size": 512, "intermediate_size": 1408, **heads, **layers})
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).train()
    if attention == "packed_sdpa":
        hand_over_whole_rows(model.model.visual)
    return model


def packed_backward(model, samples, encoder, build_inputs) -> None:
    """Forward and backward of samples in one row, as finetune.py does it."""
    micro_batch = pack(samples, encoder)
    logits = model(**build_inputs(micro_batch)).logits[0]
    F.cross_entropy(logits, micro_batch.targets, reduction="sum").backward()


def padded_backward(model, samples, encoder, build_inputs) -> None:
    """Forward and backward of samples in a row each, padded."""
    lengths = torch.tensor([len(s.input_ids) for s in samples])
    labels = pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORE)
    inputs = {
        "input_ids": pad_sequence([s.input_ids for s in samples], batch_first=True),
        "attention_mask": (torch.arange(labels.shape[1]) < lengths[:, None]).long(),
        "position_ids": pad_sequence([s.position_ids.T for s in samples]).permute(2, 1, 0),
    }
    if grids := [grid for s in samples for grid in s.grids]:
        inputs["image_grid_thw"] = torch.tensor(grids)
        inputs["pixel_values"] = build_inputs.normalize(torch.cat([s.patches for s in samples]))
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    supervised = labels[:, 1:] != IGNORE
    logits = model.lm_head(hidden[:, :-1][supervised])
    F.cross_entropy(logits, labels[:, 1:][supervised], reduction="sum").backward()


def measure_step(variant: str) -> dict:
    """Return tokens per second, seconds and peak memory of one way to run a step."""
    flags = {"max_pixels": 400 * 784, "batch_size": NUM_SAMPLES, "max_tokens": 2048}
    config, processor, encoder = load_tiny(**flags)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_data([write_data(Path(folder))], encoder, config)
        samples = [data.samples[i] for i in range(NUM_SAMPLES)]
    step = data.plan.step(0)
    if variant == "packed":
        backward, attention, batches = packed_backward, "packed_sdpa", step.micro_batches[0]
    else:
        size = 4 if variant == "padded" else 1
        batches = torch.arange(NUM_SAMPLES).split(size)
        backward, attention = padded_backward, "sdpa"
    model = make_model(encoder, attention)
    build_inputs = InputBuilder(processor, attention, torch.device("cpu"))
    idle = resident_gib()
    for i in range(1 + NUM_STEPS):
        if i == 1:  # the first one warms up
            started = time.perf_counter()
        model.zero_grad()
        for batch in batches:
            backward(model, [samples[i] for i in batch], encoder, build_inputs)
    seconds = (time.perf_counter() - started) / NUM_STEPS
    return {"speed": step.num_tokens / seconds, "seconds": seconds, "gib": resident_gib() - idle}


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
    kept = labels != IGNORE if variant == "supervised positions" else slice(None)
    logits = lm_head(hidden[kept]).float()
    F.cross_entropy(logits, labels[kept], reduction="sum", ignore_index=IGNORE).backward()
    return {"seconds": time.perf_counter() - started, "gib": resident_gib() - idle}


def main() -> None:
    print_header("step", "tokens/s", "seconds", "peak GiB")
    for variant in ("packed", "padded", "one by one"):
        print_row(variant, *run_alone("bench_step.measure_step", variant).values())
    print()
    print_header("logits, a quarter of 2,048 tokens supervised", "seconds", "peak GiB")
    for variant in ("all positions", "supervised positions"):
        print_row(variant, *run_alone("bench_step.measure_logits", variant).values())


if __name__ == "__main__":
    main()
