"""Runs the scripts on GPUs that compute nothing, all in one process, or in the ranks of a launcher.

    PYTHONPATH=.:tests LD_PRELOAD=.../libcuda.so.1 python tests/nullgpu/driver.py [FLAGS] FOLDER

FOLDER/cases.json is a list of {"name": text, "script": "finetune", "flags": [...]}; what a launcher
gives its script, FLAGS, goes before those of training runs. Into FOLDER/report.json goes, of each
case by its name, what it has asked of the device: counts and names for each training step and in
all, the lines of Python that have waited for the device, and the message with which it has ended,
"" if none. "cudnn": false keeps convolutions from it. "room" is for a last case, which ends as the
script would: the share of the memory that it has. {"name": text, "step": {...}} is a step of a real
shape, of which benchmarks/bench_gpu.py tells what it takes; {"name": text, "planned": [...]} has
the arguments for a test of test_gpu.py.
"""

import importlib
import itertools
import json
import os
import shutil
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers import GenerationMixin

import finetune
import test_gpu
from benchmarks.bench_gpu import measure_step, prepare_step, take_counts
from helpers import call
from util.config import UserError
from util.run import explain_out_of_memory, is_main_process, run_rank

FLAGS, FOLDER = sys.argv[1:-1], Path(sys.argv[-1])
# Whether an answer is complete is computed on the device: here, all have two tokens.
IS_INCOMPLETE = itertools.cycle([True, True, False])


def run_case(script: str, flags: list[str]) -> dict:
    """Run a script's main() and return the report on it."""
    steps, others, end = [], [Counter()], ""
    module = importlib.import_module(script)
    is_training = hasattr(module, "train")
    loop = module if is_training else finetune
    set_learning_rate, log_step = loop.set_learning_rate, loop.RunLog.step

    def begin_step(*args):
        others.append(take_counts())
        return set_learning_rate(*args)

    def end_step(log, metrics, problems):
        counts = take_counts() + Counter(micro_batches=metrics["num_micro_batches"])
        steps.append(counts + Counter(graphs=counters["stats"]["unique_graphs"]))
        log_step(log, metrics, problems)

    loop.set_learning_rate, loop.RunLog.step = begin_step, end_step
    take_counts()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call(module, *(FLAGS if is_training else []), *flags)
        except torch.OutOfMemoryError as error:
            end = str(explain_out_of_memory(error))
        except UserError as error:
            end = str(error)
        except Exception:  # the other cases may go well
            end = traceback.format_exc()
    torch.cuda.set_sync_debug_mode("default")
    loop.set_learning_rate, loop.RunLog.step = set_learning_rate, log_step
    total = sum([*others, *steps, take_counts()], Counter())
    waits = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    between = others[2:]  # logging, signals, saving
    return {"steps": steps, "between": between, "total": total, "waits": waits, "end": end}


def write(report: dict) -> None:
    """Write the report, once for all ranks."""
    if dist.is_initialized():
        backends = (dist.group.WORLD._get_backend(torch.device(kind)) for kind in ("cpu", "cuda"))
        report["limits"] = [backend.options._timeout.total_seconds() for backend in backends]
    if is_main_process():
        (FOLDER / "report.json").write_text(json.dumps(report))


def main() -> None:
    report = {}
    GenerationMixin._has_unfinished_sequences = lambda *_, **__: next(IS_INCOMPLETE)
    for case in json.loads((FOLDER / "cases.json").read_text()):
        torch.backends.cudnn.enabled = case.get("cudnn", True)
        for path in case.get("remove", []):
            shutil.rmtree(path, ignore_errors=True)
        if "step" in case:
            step = prepare_step(**case["step"])
            report[case["name"]] = measure_step(step, num_steps=1, estimates=False)
        elif "planned" in case:
            test_gpu.test_the_planned_peak_is_that_of_the_gpu(*case["planned"])
        elif "room" in case:  # the last one, which ends as the script would
            write(report)
            torch.cuda.set_per_process_memory_fraction(case["room"])
            call(importlib.import_module(case["script"]), *FLAGS, *case["flags"])
        else:
            report[case["name"]] = run_case(case["script"], case["flags"])
        torch.cuda.empty_cache()
    write(report)


if __name__ == "__main__":
    run_rank(main) if "RANK" in os.environ else main()
