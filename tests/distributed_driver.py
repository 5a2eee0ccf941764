"""Runs finetune_distributed.main() under torchrun as the tests want it.

    torchrun ... tests/distributed_driver.py CASES.json

CASES is a list of {"argv": [...], "hook": name or null}: one run each, in one process group. Every
run also leaves its final weights, fp32 and whole, in OUTPUT_DIR/final.pt; one that a signal stops,
a checkpoint instead.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import finetune_distributed
from util import distributed, run
from util.data import index as index_module
from util.data import plan as plan_module
from util.distributed import export_sharded_model
from util.run import EXIT_STOPPED

RANK = int(os.environ["RANK"])


def export_with_final_weights(model, processor, output_dir):
    """Export as ever, and save every parameter as it was trained."""
    whole = {name: p.detach().full_tensor().cpu() for name, p in model.named_parameters()}
    export_sharded_model(model, processor, output_dir)
    if RANK == 0:
        torch.save(whole, Path(output_dir) / "final.pt")


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


def on_step(step, do):
    """Call `do` when rank 1 reads the first micro-batch of a step."""
    load = finetune_distributed.load_micro_batches

    def load_and_fail(*args):
        for i, micro_batch in enumerate(load(*args)):
            if RANK == 1 and i == step:
                do()
            yield micro_batch

    finetune_distributed.load_micro_batches = load_and_fail


def stop_after(num_steps):
    """Send rank 1 SIGTERM in the step after which the run shall stop; once."""
    learning_rate_at = finetune_distributed.learning_rate_at

    def signal_and_return(global_step, *args):
        if RANK == 1 and global_step == num_steps - 1:
            finetune_distributed.learning_rate_at = learning_rate_at
            signal.raise_signal(signal.SIGTERM)
        return learning_rate_at(global_step, *args)

    finetune_distributed.learning_rate_at = signal_and_return


def stop_late(num_steps):
    """Send rank 1 SIGTERM in a step when the ranks have agreed already to go on; once."""
    agree_on_signal, calls = finetune_distributed.agree_on_signal, []

    def agree_and_signal(stop, device):
        agree_on_signal(stop, device)
        calls.append(stop)
        if len(calls) == num_steps:
            finetune_distributed.agree_on_signal = agree_on_signal
            if RANK == 1:
                signal.raise_signal(signal.SIGTERM)

    finetune_distributed.agree_on_signal = agree_and_signal


def fail_to_export():
    """On the main process, have the disk fill up at the first export."""
    write = distributed.write_model

    def full(*args):
        distributed.write_model = write
        raise OSError("No space left on device")

    distributed.write_model = full


def measure_badly():
    """On rank 1, find every sample bad: what the main process finds must count."""
    if RANK == 1:
        index_module._measure = lambda *_: "bad on this rank alone"


def fail():
    raise torch.OutOfMemoryError("rank one ran out of memory")


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
    report = {}

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
            export_sharded_model(model, processor, output_dir)
        Path(output_dir, f"memory-{RANK}.json").write_text(json.dumps(report))

    finetune_distributed.load_sharded_model = watched_load
    finetune_distributed.build_optimizer = watched_build
    finetune_distributed.export_sharded_model = watched_export


def local_bytes(tensors):
    """Return the bytes of the storages under this rank's shards; shards may share one."""
    storages = [tensor.to_local().untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def private_bytes():
    """Memory of this process that is no file's: mapped files are shared and can be dropped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


HOOKS = {
    "adversarial": adversarial,
    "raise": lambda: on_step(2, fail),
    "kill": lambda: on_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "memory": record_memory,
    "measure badly": measure_badly,
    "stop after 7": lambda: stop_after(7),
    "stop after 8": lambda: stop_after(8),
    "stop late": lambda: stop_late(3),
    "fail to export": fail_to_export,
}


def main():
    finetune_distributed.export_sharded_model = export_with_final_weights
    for case in json.loads(Path(sys.argv[1]).read_text()):
        if case.get("hook"):
            HOOKS[case["hook"]]()
        started = time.perf_counter()
        sys.argv = ["finetune_distributed.py", *map(str, case["argv"])]
        try:
            finetune_distributed.main()
        except SystemExit as end:
            assert end.code == EXIT_STOPPED and case["hook"].startswith("stop"), end
        print(f"case {case} rank {RANK}: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run.run_rank(main)
