"""What fits where (docs/memory.md): planned, and counted on a GPU that computes nothing.

    tests/nullgpu/build.sh /tmp/nullgpu
    LD_PRELOAD=/tmp/nullgpu/libcuda.so.1 TRITON_LIBCUDA_PATH=/tmp/nullgpu NULLGPU_DEVICES=90:400 \
        CUDA_VISIBLE_DEVICES=0 python -m benchmarks.bench_fits 2B

Steps of 4 samples of 4,094 tokens and 2 images, a micro-batch each; GiB. States: weights, gradients
and AdamW's moments, as planned. Planned, allocated, reserved: as in bench_gpu, segments grow. Name
several models for one table below the other; a number of GPUs that share the states can follow
each, as in 7B:8.
"""

import sys

from benchmarks.bench_gpu import measure_step, prepare_step
from benchmarks.common import print_header, print_row
from util.tools.planner import GIB, SAVERS, count_states, flags_text

SMALLEST = {"gradient_checkpointing": "all", "lora_rank": 16, "precision": "bf16_4bit"}


def main() -> None:
    """Print a table for each model of the command line."""
    for name in sys.argv[1:]:
        model, _, num_gpus = name.partition(":")
        num_gpus = int(num_gpus or 1)
        print_header(f"{model} on {num_gpus}", "states", "planned", "allocated", "reserved")
        for flags in ({}, *SAVERS, SMALLEST):
            step = prepare_step("2 images", model, num_gpus, repeats=4, **flags)
            states = sum(count_states(step.model_config, step.config)) / num_gpus / GIB
            row = measure_step(step)
            figures = (row[f"{kind}_gib"] for kind in ("planned", "allocated", "reserved"))
            print_row(f"`{flags_text(flags)}`", states, *figures)


if __name__ == "__main__":
    main()
