"""How training scales with the number of ranks: measured here on CPUs, projected for H100s.

    python benchmarks/bench_scaling.py              # 1, 2 and 4 ranks here, then the projection
    python benchmarks/bench_scaling.py --projection # the projection alone

Measured: finetune_distributed.py on tiny; bytes are counted where fully_shard calls collectives.
Projected: arithmetic from the shapes of the models, no GPU was used; the formulas are printed with
the figures, and checked against PyTorch's own count of tiny's operations.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from util.tools.flops import count_flops, published_config, shape_of  # noqa: E402

NUM_STEPS = 12
# Dense bf16 peak, NVLink and InfiniBand (400 Gb/s) of one H100 SXM, one direction, and the share of
# each that is assumed to be reached. https://www.nvidia.com/en-us/data-center/h100/
PEAK_FLOPS, NVLINK, NETWORK = 989e12, 450e9, 50e9
REACHED_FLOPS, REACHED_BANDWIDTH = 0.45, 0.7
TOKENS_OF_A_MICRO_BATCH, IMAGE_SHARE, SUPERVISED_SHARE = 8192, 0.5, 0.3
SEGMENT = 1024  # tokens of one sample: attention does not look beyond

# ---------------------------------------------------------------- measured


def run_rank(argv: list[str]) -> None:
    """Be one rank: train, and on the main rank write down what collectives were given."""
    import finetune_distributed
    from util import run

    counts = {}

    def counted(name, whole, times):
        """Count what a ring algorithm sends for a collective whose argument `whole` is a tensor."""
        collective = getattr(dist, name)
        signature = inspect.signature(collective)

        def call(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            tensor, n = arguments[whole], dist.get_world_size(arguments.get("group"))
            sent = times * tensor.numel() * tensor.element_size() * (n - 1) / n
            counts[name] = counts.get(name, 0) + sent
            return collective(*args, **kwargs)

        setattr(dist, name, call)

    # Those that fully_shard calls in torch 2.14. Clipping and the loss add some bytes.
    counted("all_gather_single", "output_tensor", 1)
    counted("reduce_scatter_single", "input", 1)
    counted("all_reduce", "tensor", 2)
    train = finetune_distributed.train

    def counted_train(*args):
        counts.clear()
        train(*args)
        if dist.get_rank() == 0:
            Path(args[0].output_dir, "bytes.json").write_text(json.dumps(counts))

    finetune_distributed.train = counted_train
    sys.argv = ["finetune_distributed.py", *argv]
    run.run_rank(finetune_distributed.main)


def measure(num_ranks: int, shard_size: int) -> str:
    """Train tiny for some steps; return one row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model_name_or_path", "tiny", "--batch_size", "12", "--num_workers", "0"]
        flags += ["--max_steps", str(NUM_STEPS), "--output_dir", f"{folder}/out"]
        flags += ["--shard_size", str(shard_size), "--max_tokens", "700"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run(
            [*launcher, "--nproc_per_node", str(num_ranks), __file__, "--rank", *flags],
            check=True,
            cwd=REPO,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = Path(folder, "out", "metrics.jsonl").read_text().splitlines()
        counts = json.loads(Path(folder, "out", "bytes.json").read_text())
    rows = [json.loads(line) for line in lines][2:]  # the first two warm up
    speed = sum(r["num_tokens"] for r in rows) / sum(r["seconds"] for r in rows)
    names = ("all_gather_single", "reduce_scatter_single", "all_reduce")
    megabytes = [counts.get(name, 0) / NUM_STEPS / 1e6 for name in names]
    micro_batches = sum(r["num_micro_batches"] for r in rows) / len(rows)
    return f"{num_ranks:5} {shard_size:6} {speed:10,.0f} {micro_batches:14.1f} " + " ".join(
        f"{value:15.1f}" for value in megabytes
    )


# ---------------------------------------------------------------- projected


def check_formula() -> None:
    """Compare count_flops with PyTorch's count on tiny: one sample, one image."""
    from util.model.tiny import cached_tiny_model

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        cached_tiny_model(), dtype=torch.float32, attn_implementation="eager"
    ).train()
    config = model.config
    num_image_tokens, num_tokens = 64, 256
    grid = torch.tensor([[1, 16, 16]])
    input_ids = torch.full((1, num_tokens), 65)
    input_ids[0, :num_image_tokens] = config.image_token_id
    with FlopCounterMode(display=False) as counter:
        logits = model(
            input_ids=input_ids,
            pixel_values=torch.randn(256, 1176),
            image_grid_thw=grid,
            mm_token_type_ids=(input_ids == config.image_token_id).int(),
            use_cache=False,
        ).logits
        logits.sum().backward()
    counted = counter.get_total_flops()
    pairs = num_tokens**2, 256**2
    formula = count_flops(shape_of(model), num_tokens, num_image_tokens, num_tokens, *pairs)
    print(f"check on tiny: formula {formula / 1e9:.3f} GFLOP, PyTorch counts {counted / 1e9:.3f}\n")


FORMULAS = """
PROJECTION, no GPU was used. For one micro-batch on each of n GPUs, P parameters, shards of s:
  FLOPs   = 6 x (decoder x T + lm_head x supervised + vision x 4 T_image + merger x T_image)
            + 12 x layers x hidden x segment x tokens (text and vision); with gradient
            checkpointing x 4/3
  bytes   = (s-1)/s x P x (2 + 2 + 4): weights gathered in bf16 forward and backward, gradients
            reduced in fp32; the root, with the embeddings, is gathered once, in fp32: also 2 + 2
  replicas add, once a step, 2 x (n/s-1)/(n/s) x 4 P/s bytes between machines
  seconds = max(FLOPs / reached FLOPS, bytes / reached NVLink) for each micro-batch, + all-reduce
A machine has 8 GPUs, s = 8 unless the states (16 bytes a parameter) need more; then bytes go over
the network. One step is 8 micro-batches.""".strip()


def project(name: str, num_gpus: int) -> str:
    """Return one row of the projection."""
    with torch.device("meta"):
        config = published_config(f"Qwen/Qwen2-VL-{name}-Instruct")
        model = transformers.AutoModelForImageTextToText.from_config(config)
    shape, num_parameters = shape_of(model), sum(p.numel() for p in model.parameters())
    tokens, num_micro_batches = TOKENS_OF_A_MICRO_BATCH, 8
    num_image_tokens = tokens * IMAGE_SHARE
    pairs = tokens * SEGMENT, 4 * num_image_tokens * 2 * SEGMENT
    flops = count_flops(shape, tokens, num_image_tokens, tokens * SUPERVISED_SHARE, *pairs)
    compute = flops * 4 / 3 / (PEAK_FLOPS * REACHED_FLOPS)
    shard_size = 8
    while shard_size < num_gpus and 16 * num_parameters / shard_size > 50e9:
        shard_size *= 2
    states = 16 * num_parameters / shard_size / 2**30
    bandwidth = (NVLINK if shard_size <= 8 else NETWORK) * REACHED_BANDWIDTH
    traffic = (shard_size - 1) / shard_size * num_parameters * 8
    replicas = num_gpus / shard_size
    all_reduce = 2 * (replicas - 1) / replicas * 4 * num_parameters / shard_size
    seconds = num_micro_batches * max(compute, traffic / bandwidth)
    seconds += all_reduce / (NETWORK * REACHED_BANDWIDTH)
    speed = num_gpus * num_micro_batches * tokens / seconds
    fits = "" if states < 60 else "  does not fit in 80 GB"
    return (
        f"{name:>4} {num_parameters / 1e9:7.2f} {num_gpus:5} {shard_size:6} {flops / 1e12:8.0f} "
        f"{traffic / 1e9:8.1f} {all_reduce / 1e9:8.1f} {compute:8.2f} {traffic / bandwidth:8.2f} "
        f"{speed:11,.0f} {states:8.1f}{fits}"
    )


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        return run_rank(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--projection", action="store_true", help="measure nothing")
    if not parser.parse_args().projection:
        print(f"measured: tiny on {os.cpu_count()} CPU cores, gloo, one thread a rank, fp32")
        print("MB: what each rank sends in a step, by a ring algorithm")
        print(
            "ranks shards   tokens/s  micro-batches  MB: all-gather  reduce-scatter      all-reduce"
        )
        for num_ranks, shard_size in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)):
            print(measure(num_ranks, shard_size), flush=True)
        print()
    check_formula()
    print(FORMULAS)
    print(
        f"Reached: {REACHED_FLOPS:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOPS, {REACHED_BANDWIDTH:.0%} "
        f"of {NVLINK / 1e9:.0f} (NVLink) and {NETWORK / 1e9:.0f} GB/s (network). T = "
        f"{TOKENS_OF_A_MICRO_BATCH}, {IMAGE_SHARE:.0%} of images, {SUPERVISED_SHARE:.0%} "
        f"supervised, segments of {SEGMENT}."
    )
    print(
        "\n        P e9  GPUs shards   TFLOP  shard GB  repl GB  compute s   comm s    tokens/s "
        "states GiB"
    )
    for num_gpus in (8, 64):
        for name in ("2B", "7B", "72B"):
            print(project(name, num_gpus))


if __name__ == "__main__":
    main()
