"""Runs finetune_distributed.main() under torchrun as the tests want it.

    torchrun ... tests/distributed_driver.py CASES.json

CASES is a list of {"argv": [...], "hook": name or null, "end": text}: one run each, in one process
group. Where `end` is not empty, the run has to end early, with an exit code or error that has it.
"""

import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import finetune_distributed
from util import checkpoint, distributed, run
from util import output_dir as output_dir_module
from util.config import UserError
from util.data import index as index_module
from util.data import plan as plan_module
from util.data.files import Records
from util.model import load

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[1]).parent


def adversarial():
    """Deal to a rank samples of one kind only, or none; which it is differs from step to step."""

    def deal(plan, samples):
        index, hands = plan.index, [[] for _ in range(plan.world_size)]
        for i in samples:
            kind = 0 if index.num_video_tokens[i] else 1 if index.num_image_tokens[i] else 2
            # Of the four hands, one is always empty; those that nobody holds go to rank 0.
            rank = (kind + sum(samples)) % 4
            hands[rank if rank < plan.world_size else 0].append(i)
        bins = [plan._pack(hand) for hand in hands]
        most = max(map(len, bins))
        return [hand + [[]] * (most - len(hand)) for hand in bins]

    plan_module.Plan._deal = deal


def in_step(step, do):
    """Call `do` on rank 1 at the beginning of a step; once."""
    set_learning_rate = finetune_distributed.set_learning_rate

    def do_and_set(optimizer, global_step, *args):
        if RANK == 1 and global_step == step - 1:
            finetune_distributed.set_learning_rate = set_learning_rate
            do()
        return set_learning_rate(optimizer, global_step, *args)

    finetune_distributed.set_learning_rate = do_and_set


def stop_late(num_steps):
    """Send rank 1 SIGTERM in a step when the ranks have agreed already to go on; once."""
    agree, calls = run.StopSignal.agree, []

    def agree_and_signal(stop):
        agree(stop)
        calls.append(stop)
        if len(calls) == num_steps:
            run.StopSignal.agree = agree
            if RANK == 1:
                signal.raise_signal(signal.SIGTERM)

    run.StopSignal.agree = agree_and_signal


def stop_in_evaluation():
    """Send rank 1 SIGTERM in the first micro-batch of the evaluation after a step; once."""
    cross_entropy_sum, trained = finetune_distributed.cross_entropy_sum, []

    def signal_and_sum(*args):
        if torch.is_grad_enabled():
            trained.append(1)
        elif trained and RANK == 1:
            finetune_distributed.cross_entropy_sum = cross_entropy_sum
            signal.raise_signal(signal.SIGTERM)
        return cross_entropy_sum(*args)

    finetune_distributed.cross_entropy_sum = signal_and_sum


def fail_to_export():
    """On the main process, have the disk fill up at the first export."""
    write = load.write_model

    def full(*args):
        load.write_model = write
        raise OSError("No space left on device")

    load.write_model = full


def measure_badly():
    """On rank 1, find every sample bad: what the main process finds must count."""
    if RANK == 1:
        index_module._measure = lambda *_: "bad on this rank alone"


def other_text():
    """On every rank but the main one, have other data, as a copy on another machine may."""
    if RANK:
        Records.digest = lambda records: "another"


def apart():
    """Go on in a folder of this rank's own, as on a machine of its own."""
    (FOLDER / f"machine-{RANK}").mkdir()
    os.chdir(FOLDER / f"machine-{RANK}")
    output_dir_module.SHARED_FOLDER_SECONDS = 1


def fail():
    raise torch.OutOfMemoryError("rank one ran out of memory")


def freeze():
    """Stop rank 1 in a step, as a debugger or a hung driver does."""
    distributed.BEAT_SECONDS, distributed.SILENT_SECONDS = 0.5, 6
    in_step(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))


@contextmanager
def peak_memory(report, key):
    """Put into `report[key]` how far this process's own memory rises, in bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before counts for nothing
    before, peaks, done = private_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peaks.append(private_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    report[key] = max(peaks)


def record_memory():
    """Save this rank's bytes of parameters, gradients and optimizer state, and peaks of memory."""
    load, build = finetune_distributed.load_sharded_model, finetune_distributed.build_optimizer
    export, report = checkpoint.export_model, {}

    def watched_load(*args):
        with peak_memory(report, "peak_of_loading"):
            return load(*args)

    def watched_build(model, *args):
        optimizer = build(model, *args)
        parameters = list(model.parameters())

        def look(*_):
            report["parameters"] = local_bytes(parameters)
            report["gradients"] = local_bytes([p.grad for p in parameters])
            states = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
            report["optimizer"] = local_bytes(states)

        optimizer.register_step_post_hook(look)
        return optimizer

    def watched_export(model, processor, output_dir):
        with peak_memory(report, "peak_of_exporting"):
            export(model, processor, output_dir)
        Path(output_dir, f"memory-{RANK}.json").write_text(json.dumps(report))

    finetune_distributed.load_sharded_model = watched_load
    finetune_distributed.build_optimizer = watched_build
    checkpoint.export_model = watched_export


def local_bytes(tensors):
    """Return the bytes of the storages under this rank's shards; shards may share one."""
    storages = [tensor.to_local().untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def private_bytes():
    """Memory of this process that is no file's: mapped files are shared and can be dropped."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


HOOKS = {
    "adversarial": adversarial,
    "raise": lambda: in_step(3, fail),
    "kill": lambda: in_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "freeze": freeze,
    "memory": record_memory,
    "measure badly": measure_badly,
    "other text": other_text,
    "apart": apart,
    "stop after 7": lambda: in_step(7, lambda: signal.raise_signal(signal.SIGTERM)),
    "stop after 8": lambda: in_step(8, lambda: signal.raise_signal(signal.SIGTERM)),
    "stop in evaluation": stop_in_evaluation,
    "stop late": lambda: stop_late(3),
    "fail to export": fail_to_export,
}


def main():
    for case in json.loads(Path(sys.argv[1]).read_text()):
        if case["hook"]:
            HOOKS[case["hook"]]()
        started, end = time.perf_counter(), ""
        sys.argv = ["finetune_distributed.py", *case["argv"]]
        try:
            finetune_distributed.main()
        except (SystemExit, UserError) as error:
            end = str(error)
        assert bool(end) == bool(case["end"]) and case["end"] in end, end
        print(f"case {case} rank {RANK}: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run.run_rank(main)
