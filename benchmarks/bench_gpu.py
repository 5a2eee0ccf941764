"""A training step of Qwen2-VL's real shapes on the GPU that computes nothing (tests/nullgpu).

    tests/nullgpu/build.sh /tmp/nullgpu
    LD_PRELOAD=/tmp/nullgpu/libcuda.so.1 TRITON_LIBCUDA_PATH=/tmp/nullgpu NULLGPU_DEVICES=90:400 \
        CUDA_VISIBLE_DEVICES=0 python -m benchmarks.bench_gpu

A micro-batch of some 4,095 tokens. Counted: launches of kernels and matrix products, and waits.
Host: milliseconds of CPU time on this machine. In GiB, the most that PyTorch's allocator had handed
out, what it had reserved for that, in segments that grow, as the launchers ask for, and in fixed
ones, and what was planned. With several GPUs, it is one of them; the others do not exist.
Estimated: what the GPU would take, see Roofline; what is compiled is not estimated.
"""

import ctypes
import gc
import json
import math
import tempfile
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.common import print_header, print_row
from check_data import load_for_plan
from util.config import Config, fill_defaults
from util.data.batch import prepare_data
from util.distributed import shard_model
from util.model.attention import choose_attention, register_attention
from util.model.inputs import InputBuilder
from util.model.loss import cross_entropy_sum
from util.model.parts import prepare_for_training
from util.optim import build_optimizer, set_learning_rate
from util.tools.flops import PEAK_FLOPS, FlopCounter
from util.tools.planner import GIB, plan_memory

# Of each sample: images, their side in pixels, tokens, supervised tokens.
DATA = {
    "one text": [(0, 0, 4094, 2000)],
    "14 short texts": [(0, 0, 250 + 6 * i, 100) for i in range(14)],
    "2 images": [(2, 896, 4094, 500)],
    "11 images": [(1, 448, 360 + 2 * i, 60) for i in range(11)],
}
CUDA = torch.device("cuda", 0)
# Bytes a second of the makers' data sheets.
BANDWIDTH = {"H100": 3.35e12, "A100": 2.04e12, "RTX 4090": 1.01e12}
WITHOUT_WORK = ("detach", "empty", "_unsafe_view", "lift_fresh", "new_empty", "resize_")


class Roofline(TorchDispatchMode):
    """Adds up the seconds that a GPU would need at least for each operation.

    That is the largest of: operations / (60 % of the peak in bf16; attention 30 %, of half of the
    pairs where it is causal), bytes read and written / (80 % of the bandwidth), 2.5 microseconds.
    """

    def __init__(self):
        super().__init__()
        self.seconds = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, packet = function._schema.name.split("::")[1], function._overloadpacket
        if function.is_view or name.startswith(WITHOUT_WORK):
            return result
        # In place, without a result: the optimizer writes weights and two moments.
        written = list(args[:1]) * (3 if "adam" in name else 1) if result is None else result
        read = result if name == "embedding" else (args, kwargs)
        num_bytes = sum(map(bytes_of, tree_leaves((read, written))))
        operations = 0
        if packet in flop_registry:
            operations = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        share = 0.6
        if "varlen_attn" in name:
            is_causal = args[10 if "backward" in name else 7]
            operations, share = operations / (1 + is_causal), 0.3
        for gpu, bandwidth in BANDWIDTH.items():
            rates = share * PEAK_FLOPS[gpu], 0.8 * bandwidth
            self.seconds[gpu] += max(operations / rates[0], num_bytes / rates[1], 2.5e-6)
        return result

    def mfu(self, num_operations: float) -> dict[str, float]:
        """Return, by GPU, the share of its peak that this many operations in that time are."""
        return {gpu: num_operations / s / PEAK_FLOPS[gpu] for gpu, s in self.seconds.items()}


def bytes_of(value) -> int:
    """Return the bytes of a tensor on the GPU; what is repeated in it is read once."""
    if not isinstance(value, torch.Tensor) or not value.is_cuda:
        return 0
    sizes = [size for size, stride in zip(value.shape, value.stride()) if stride]
    return value.itemsize * math.prod(sizes)


def take_counts() -> Counter:
    """Return what has been asked of the devices since the last time, kernels by "kernel " names."""
    with tempfile.NamedTemporaryFile() as file:
        ctypes.CDLL(None).nullgpu_report(file.name.encode())
        counts = json.loads(Path(file.name).read_text())
    kernels, calls = counts.pop("kernels"), counts.pop("calls")
    total = Counter(counts) + Counter(calls)
    for name, count in kernels:  # a template has several of one name
        total[f"kernel {name}"] += count
    return total


def write_data(folder: Path, samples: list[tuple], encoder) -> str:
    """Write a data file of samples as in DATA; a digit is a token."""
    records = []
    for num_images, side, num_tokens, num_supervised in samples:
        content = [{"type": "text", "text": ""}]
        if num_images:
            Image.new("RGB", (side, side)).save(folder / "a.png")
            content = [{"type": "image", "image": "a.png"}] * num_images + content
        answer = {"role": "assistant", "content": "7" * (num_supervised - 1)}  # and <|im_end|>
        record = {"messages": [{"role": "user", "content": content}, answer]}
        content[-1]["text"] = "7" * (num_tokens - encoder.measure(record, folder)[0])
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return str(path)


def prepare_step(
    data: str,
    model: str = "2B",
    num_gpus: int = 1,
    repeats: int = 1,
    num_layers: int | None = None,
    **flags,
) -> SimpleNamespace:
    """Return all that a step takes but the model, and the GiB that are planned for it.

    A step has the samples of DATA `repeats` times. num_layers: of text and vision; None: all.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = f"Qwen/Qwen2-VL-{model}-Instruct"
        batch_size = repeats * len(DATA[data])
        config = Config(model_name_or_path=name, batch_size=batch_size, **flags)
        config = fill_defaults(config, "cuda")
        processor, encoder, model_config = load_for_plan(config)
        if num_layers:
            model_config.vision_config.depth = num_layers
            model_config.text_config.num_hidden_layers = num_layers
            model_config.text_config.layer_types = ["full_attention"] * num_layers
        path = write_data(Path(folder), repeats * DATA[data], encoder)
        planned_data = prepare_data([path], encoder, config)
        batches = next(planned_data.plan.steps(0, 1)).micro_batches[0]
        read = planned_data.samples
        micro_batches = [read.collate([read[i] for i in numbers]) for numbers in batches]
        planned = plan_memory(model_config, processor, config, planned_data, num_gpus)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(model_config)
    samples = [i for numbers in batches for i in numbers]
    return SimpleNamespace(
        config=config,
        num_gpus=num_gpus,
        processor=processor,
        model_config=model_config,
        num_operations=FlopCounter(model, planned_data.index, config)(samples),
        micro_batches=[micro_batch.pin_memory() for micro_batch in micro_batches],
        planned_gib=planned["peak_gib"],
    )


def build_model(step: SimpleNamespace, attention: str):
    """Return a model on the GPU, prepared for training, with this GPU's share of the weights."""
    register_attention(attention)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            step.model_config, dtype=torch.float32, attn_implementation=attention
        ).train()
    prepare_for_training(model, step.config)
    if step.num_gpus > 1:
        shape = (1, step.num_gpus)
        mesh = init_device_mesh("cuda", shape, mesh_dim_names=("replicate", "shard"))
        shard_model(model, mesh, step.config)
    model.to_empty(device=CUDA)
    model.tie_weights()
    return model


def measure_step(
    step: SimpleNamespace, segments_grow: bool = True, num_steps: int = 3, estimates: bool = True
) -> dict:
    """Return what a step takes on a GPU, its states over `num_gpus`, and what was planned of it.

    step: of prepare_step. segments_grow: the allocator's expandable_segments, set by the launchers.
    num_steps: after the first one; of milliseconds, the least is taken. estimates: with Roofline.
    """
    gc.collect()  # what earlier steps have left
    torch.cuda.empty_cache()
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{segments_grow}")
    if step.num_gpus > 1:
        dist.init_process_group("fake", rank=0, world_size=step.num_gpus, store=FakeStore())
    config, attention = step.config, choose_attention(CUDA, step.config.precision)
    model = build_model(step, attention)
    inputs = InputBuilder(step.processor, attention, CUDA), step.micro_batches
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 1, 100, config)
    spans, num_graphs = time_steps(optimizer), counters["stats"]["unique_graphs"]
    started = time.perf_counter()
    run_step(model, inputs, optimizer, config)
    first = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(num_steps):
        take_counts()
        started = time.process_time()
        run_step(model, inputs, optimizer, config)
        seconds.append(time.process_time() - started)
        counts = take_counts()
    peaks = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    roofline = Roofline()
    if estimates and step.num_gpus == 1 and not config.compile and config.precision == "bf16":
        with roofline:
            run_step(model, inputs, optimizer, config)
    if step.num_gpus > 1:
        dist.destroy_process_group()
    return {
        "num_tokens": sum(batch.input_ids.shape[1] for batch in step.micro_batches),
        "first_seconds": first,
        "num_graphs": counters["stats"]["unique_graphs"] - num_graphs,
        "host_ms": 1000 * min(seconds),
        "optimizer_ms": 1000 * min(spans),
        "allocated_gib": peaks[0],
        "reserved_gib": peaks[1],
        "planned_gib": step.planned_gib,
        "counts": counts,
        "estimated_ms": {gpu: 1000 * least for gpu, least in roofline.seconds.items()},
        "estimated_mfu": roofline.mfu(step.num_operations),
    }


def time_steps(optimizer) -> list[float]:
    """Return a list that gets the seconds of CPU time of each step of the optimizer."""
    spans = []
    optimizer.register_step_pre_hook(lambda *_: spans.append(-time.process_time()))
    optimizer.register_step_post_hook(lambda *_: spans.append(spans.pop() + time.process_time()))
    return spans


def run_step(model, inputs, optimizer, config: Config) -> None:
    """Run a step, as the loop does."""
    build_inputs, micro_batches = inputs
    num_supervised_tokens = sum(len(micro_batch.targets) for micro_batch in micro_batches)
    autocast = torch.autocast(
        "cuda", torch.bfloat16, enabled=config.uses_autocast, cache_enabled=False
    )
    for micro_batch in micro_batches:
        with autocast:
            logits = model(**build_inputs(micro_batch)).logits
        targets = micro_batch.targets.to(CUDA, non_blocking=True)
        loss_sum = cross_entropy_sum(logits, targets)
        del logits
        (loss_sum / num_supervised_tokens).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure_both(data: str, **flags) -> dict:
    """Return what measure_step does, and as `fixed_gib` what segments that do not grow take."""
    step = prepare_step(data, **flags)
    fixed = measure_step(step, segments_grow=False, num_steps=1, estimates=False)
    return measure_step(step) | {"fixed_gib": fixed["reserved_gib"]}


def main() -> None:
    """Measure steps of all data, and print two tables."""
    rows = {
        data + ", `--compile`" * compiled: measure_both(data, compile=compiled)
        for compiled in (False, True)
        for data in DATA
    }
    rows["one text, `bf16_lean`"] = measure_both("one text", precision="bf16_lean")
    for data, layers in (("one text", "none"), ("2 images", "all")):
        flags = {"model": "7B", "num_gpus": 8, "gradient_checkpointing": layers}
        rows[f"{data}, 7B on one of 8 GPUs, checkpointed {layers}"] = measure_both(data, **flags)
    memory = ("allocated", "reserved", "fixed", "planned")
    print_header("2B, bf16", "launches", "waits", "host ms", *memory)
    for name, row in rows.items():
        cells = row["counts"]["launches"], row["counts"]["waits"], row["host_ms"]
        print_row(name, *cells, *(row[f"{kind}_gib"] for kind in memory))
    print_header("estimated", *(f"{gpu}: {unit}" for gpu in BANDWIDTH for unit in ("ms", "MFU")))
    for name, row in rows.items():
        if row["estimated_ms"]:
            cells = ((row["estimated_ms"][gpu], row["estimated_mfu"][gpu]) for gpu in BANDWIDTH)
            print_row(name, *chain(*cells))


if __name__ == "__main__":
    main()
