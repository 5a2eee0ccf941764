"""What a training step is made of: seconds by operator, and operations by segments.

    python -m benchmarks.bench_profile

First, 30 steps of tiny on a CPU, on the mixed data of bench_peers, by torch.profiler. Then, of how
many operations (no views) one micro-batch of the real Qwen2-VL-2B is made, forward and backward,
on tensors without memory: a GPU is fast enough to wait for the CPU that starts them. Attention
without flash-attn is one operation for each layer and run of segments of one length.
"""

import collections
import tempfile
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bench_peers import make_data
from util.config import Config, fill_defaults
from util.data.batch import load_micro_batches, pack, prepare_data
from util.model.attention import register_attention
from util.model.inputs import InputBuilder
from util.model.load import build_encoder, find_model, load_model, load_processor
from util.model.loss import cross_entropy_sum
from util.model.parts import choose_autocast, prepare_for_training
from util.optim import build_optimizer, set_learning_rate
from util.tools.flops import published_config
from util.tools.planner import _RealWithoutFake

CPU = torch.device("cpu")
FREE = ("prim::", "empty", "detach", "_unsafe_view")  # operations that compute nothing
NAME = "Qwen/Qwen2-VL-2B-Instruct"
NUM_STEPS = 30
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "norms, activations, element-wise": ("aten::mul", "aten::add", "silu", "aten::pow", "norm"),
    "AdamW and clipping": ("adamw", "AdamW", "foreach", "linalg_vector_norm"),
    "copies and concatenations": ("aten::cat", "aten::copy_", "aten::clone", "aten::fill_"),
}


def profile_steps(folder: Path) -> None:
    """Print the shares of the seconds that steps of tiny take, by operator."""
    make_data(folder, {"train": 320})
    flags = {"model_name_or_path": "tiny", "train_data": [str(folder / "train.json")]}
    config = fill_defaults(Config(**flags, video_fps=1.0, batch_size=2, num_workers=0), "cpu")
    name = find_model("tiny")
    processor = load_processor(name, config)
    data = prepare_data(config.train_data, build_encoder(name, processor, config), config, 1)
    model = load_model(name, "packed_sdpa", CPU, config).train()
    build_inputs = InputBuilder(processor, "packed_sdpa", CPU)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 1e-4)
    parameters = list(model.parameters())
    micro_batches = list(load_micro_batches(data, 0, NUM_STEPS, config, CPU, 0))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for micro_batch in micro_batches:
            loss_sum = cross_entropy_sum(
                model(**build_inputs(micro_batch)).logits, micro_batch.targets
            )
            (loss_sum / len(micro_batch.targets)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    shares = collections.Counter()
    for event in profiler.key_averages():
        group = next((g for g, words in GROUPS.items() if any(w in event.key for w in words)), None)
        shares[group or "the rest, also Python"] += event.self_cpu_time_total
    total = sum(shares.values())
    print("| tiny, 2 samples a step, 1 thread | share of the seconds |\n|---|---|")
    for group, microseconds in shares.most_common():
        print(f"| {group} | {microseconds / total:.0%} |")


class Counter(TorchDispatchMode):
    """Counts operations on fake tensors that compute something."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs, result)))
        name = function._schema.name
        if is_fake and not function.is_view and not any(word in name for word in FREE):
            self.counts[name] += 1
        return result


def count_operations(folder: Path, num_segments: int, num_images: int) -> tuple[int, int, int]:
    """Return tokens, operations, and how many of them are attention, of one micro-batch of 2B."""
    Image.new("RGB", (224, 224)).save(folder / "a.png")
    name = find_model("tiny")
    config = fill_defaults(Config(model_name_or_path=NAME, precision="bf16"), "cuda")
    processor = load_processor(name, config)
    encoder = build_encoder(name, processor, config)
    samples = []
    for i in range(num_segments):
        count = num_images // num_segments if num_images >= num_segments else i < num_images
        content = [{"type": "image", "image": str(folder / "a.png")}] * count
        words = max(1, 4096 // num_segments - 64 * count - 40)
        content.append({"type": "text", "text": "a " * words})
        answer = {"role": "assistant", "content": "yes " * 20}
        samples.append(encoder.encode({"messages": [{"role": "user", "content": content}, answer]}))
    micro_batch = pack(samples, encoder)
    model_config, own = published_config(NAME), transformers.AutoConfig.from_pretrained(name)
    for token in ("image_token_id", "video_token_id", "vision_start_token_id"):
        setattr(model_config, token, getattr(own, token))
    register_attention("packed_sdpa")
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            model_config, dtype=torch.float32, attn_implementation="packed_sdpa"
        ).train()
    prepare_for_training(model, config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device=CPU)
    model.tie_weights()
    inputs = InputBuilder(processor, "packed_sdpa", CPU)(micro_batch)
    inputs["pixel_values"] = mode.from_tensor(inputs["pixel_values"])
    with mode, Counter() as counter, _RealWithoutFake():
        with choose_autocast(CPU, "bf16"):
            logits = model(**inputs).logits
        cross_entropy_sum(logits, micro_batch.targets).backward()
    attention = sum(n for name, n in counter.counts.items() if "scaled_dot_product" in name)
    return micro_batch.input_ids.shape[1], sum(counter.counts.values()), attention


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        profile_steps(Path(folder))
        print("\n| 2B, bf16: samples in a micro-batch | images | tokens | operations | attention |")
        print("|---|---|---|---|---|", flush=True)
        for num_segments, num_images in ((1, 2), (16, 16), (64, 32)):
            counts = count_operations(Path(folder), num_segments, num_images)
            cells = " | ".join(f"{count:,}" for count in counts)
            print(f"| {num_segments} | {num_images} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
