"""Processes that read data."""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from util.config import UserError
from util.data.files import Records
from util.survive import time_limit

# What takes longer, a batch of samples, will never be read. A decoder hangs in C, where no signal
# reaches it, but its process can be given up; with --num_workers 0, or few samples to measure,
# there is none.
READ_SECONDS = 30 * 60
# Below so many samples, starting processes takes longer than measuring.
MIN_SAMPLES_FOR_PROCESSES = 256


def run_all(function, title: str, numbers: np.ndarray, records: Records, encoder) -> Iterator:
    """Yield (i, function(encoder, records, i)) for `numbers`, in order, with a progress bar."""
    numbers = numbers.tolist()
    num_workers = 0 if len(numbers) < MIN_SAMPLES_FOR_PROCESSES else num_cores()
    batches = [numbers[i : i + 16] for i in range(0, len(numbers), 16)]
    loader = DataLoader(
        batches,
        batch_size=None,
        collate_fn=lambda batch: [function(encoder, records, i) for i in batch],
        **worker_settings(num_workers) | {"worker_init_fn": _start_measuring},
    )
    # Closed as this function ends, however it does, which ends the processes.
    read = read_in_time(loader, batches, records)
    with contextlib.closing(result for results in read for result in results) as results:
        bar = tqdm(
            results, title, len(numbers), leave=num_workers > 0, disable=None, unit=" samples"
        )
        yield from zip(numbers, bar)


def read_in_time(loader: DataLoader, batches: Iterable[list[int]], records: Records) -> Iterator:
    """Yield what a loader makes of `batches` of sample numbers.

    Raises UserError where a worker process is killed, or naming the samples of a batch that takes
    over READ_SECONDS.
    """
    results, limit = iter(loader), contextlib.nullcontext()
    if loader.num_workers:
        # For a worker that was killed, torch raises in whatever line the main process is at, also
        # while it trains or saves. Without its handler, it raises where data are waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for batch in batches:
        if loader.num_workers:
            limit = time_limit(READ_SECONDS, partial(_not_read, records, batch))
        try:
            with limit:
                result = next(results)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            places = ", ".join(map(records.where, batch))
            raise UserError(
                f"a process that reads data was killed, before or at {places}. Is "
                "the main memory full (fewer --num_workers), or the shared one (docker run "
                f"--shm-size 8g)? {' '.join(str(error).split())}"
            ) from error
        yield result


def _not_read(records: Records, batch: list[int]) -> str:
    return (
        f"not read within {READ_SECONDS / 60:g} minutes: {', '.join(map(records.where, batch))}. "
        "check_data.py --show N tries one: leave out the one that does not end"
    )


def _start_measuring(worker_id: int) -> None:
    start_worker(worker_id)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # nothing has to be finished


def num_cores() -> int:
    """Return how many cores this process may use, where the system tells; else all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def worker_settings(num_workers: int) -> dict:
    """Return what DataLoaders of this repo have in common."""
    return {
        "num_workers": num_workers,
        "worker_init_fn": start_worker,
        # An open file goes to no process that is started in another way.
        "multiprocessing_context": "fork" if num_workers else None,
        # Its own, so that reading data never moves the random state of the training.
        "generator": torch.Generator(),
    }


def start_worker(worker_id: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # These reach every process of a terminal or a job; the main one decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
