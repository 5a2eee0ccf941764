"""How training scales with the number of ranks, and what they send each other.

    python -m benchmarks.bench_scaling
    python -m benchmarks.bench_scaling --ranks 1 2 --num_steps 4

finetune_distributed.py on tiny, on CPUs with gloo, one thread a rank; for each number of ranks all
shard sizes. Bytes are counted where fully_shard calls collectives, as a ring algorithm sends them.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch.distributed as dist

import finetune_distributed
from benchmarks.common import REPO, print_header, print_row
from util import run

# What fully_shard calls in torch 2.14: the argument that holds all of the data, and how many times
# over a ring sends it. Clipping and the loss add some bytes.
COLLECTIVES = {
    "all_gather_single": ("output_tensor", 1),
    "reduce_scatter_single": ("input", 1),
    "all_reduce": ("tensor", 2),
}


def count_bytes(name: str, counts: Counter) -> None:
    """Let a collective of torch.distributed add to `counts` what it sends."""
    collective, (whole, times) = getattr(dist, name), COLLECTIVES[name]
    signature = inspect.signature(collective)

    def call(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        num_ranks = dist.get_world_size(arguments.get("group"))
        counts[name] += times * arguments[whole].nbytes * (num_ranks - 1) / num_ranks
        return collective(*args, **kwargs)

    setattr(dist, name, call)


def run_rank(argv: list[str]) -> None:
    """Be one rank: train, and on the main rank write down what collectives were given."""
    counts, train = Counter(), finetune_distributed.train
    for name in COLLECTIVES:
        count_bytes(name, counts)

    def counted_train(*args):
        counts.clear()  # loading does not count
        train(*args)
        if dist.get_rank() == 0:
            Path(args[0].output_dir, "bytes.json").write_text(json.dumps(counts))

    finetune_distributed.train = counted_train
    sys.argv = ["finetune_distributed.py", *argv]
    run.run_rank(finetune_distributed.main)


def measure(num_ranks: int, shard_size: int, num_steps: int) -> tuple[float, ...]:
    """Train tiny; return tokens a second, micro-batches of a step, and MB by COLLECTIVES."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"-m torch.distributed.run --standalone --nproc_per_node {num_ranks}"
        flags += " -m benchmarks.bench_scaling --rank --model_name_or_path tiny --num_workers 0"
        flags += f" --batch_size 12 --max_tokens 700 --max_steps {num_steps}"
        flags += f" --shard_size {shard_size} --output_dir {folder}/out"
        command = [sys.executable, *flags.split()]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, check=True, cwd=REPO, env=env, capture_output=True)
        lines = Path(folder, "out", "metrics.jsonl").read_text().splitlines()
        counts = json.loads(Path(folder, "out", "bytes.json").read_text())
    rows = [json.loads(line) for line in lines][2:]  # the first two warm up
    speed = sum(row["num_tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    num_micro_batches = sum(row["num_micro_batches"] for row in rows) / len(rows)
    megabytes = (counts.get(name, 0) / num_steps / 1e6 for name in COLLECTIVES)
    return speed, num_micro_batches, *megabytes


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        return run_rank(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="powers of 2")
    parser.add_argument("--num_steps", type=int, default=12, help="more than 2")
    arguments = parser.parse_args()
    print(f"tiny on {os.cpu_count()} CPU cores, gloo, one thread a rank, fp32; MB of each rank\n")
    names = (f"{name} MB" for name in COLLECTIVES)
    print_header("ranks", "shard size", "tokens/s", "micro-batches", *names)
    for num_ranks in arguments.ranks:
        for shard_size in (size for size in (1, 2, 4) if size <= num_ranks):
            row = measure(num_ranks, shard_size, arguments.num_steps)
            print_row(num_ranks, shard_size, *row)


if __name__ == "__main__":
    main()
