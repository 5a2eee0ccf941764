"""From samples to steps: the index, the plan, packed micro-batches, and the loader.

index: what is known of every sample before the first step
plan: the whole run, laid out: steps, and for each the micro-batches of every rank
micro-batch: several samples in one row, without padding
"""

import contextlib
import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from util.config import UserError, on_main_process
from util.data_util import Records
from util.sample_util import IGNORE, Sample, SampleEncoder

logger = logging.getLogger("finetune")

REPO_DIR = Path(__file__).resolve().parent.parent
CACHE_DIR = REPO_DIR / ".cache"
# Below so many samples, starting processes takes longer than measuring.
MIN_SAMPLES_FOR_PROCESSES = 256

# ---------------------------------------------------------------- the index


@dataclass
class Index:
    """What is known of every sample before the first step: int64 arrays, one entry a sample.

    num_patch_pairs: of patches that attend to each other in the vision tower.
    """

    num_tokens: np.ndarray
    num_supervised_tokens: np.ndarray
    num_image_tokens: np.ndarray
    num_video_tokens: np.ndarray
    num_patch_pairs: np.ndarray

    def __len__(self):
        return len(self.num_tokens)

    def summary(self) -> str:
        """Return one line on how much data this is."""
        lengths = self.num_tokens[self.num_tokens > 0]
        return (
            f"{len(lengths):,} samples of {lengths.min():,} to {lengths.max():,} "
            f"tokens, {self.num_tokens.sum():,} in all: {self.num_image_tokens.sum():,} of images, "
            f"{self.num_video_tokens.sum():,} of videos, {self.num_supervised_tokens.sum():,} "
            "supervised"
        )


def build_index(records: Records, encoder: SampleEncoder) -> tuple[Index, list[str]]:
    """Measure every sample, in parallel, and return the index and a list of problems.

    The index is kept on disk, under a key of everything that it depends on except the media files
    themselves: a sample whose media have changed since is refused when it is read. Samples with
    a problem are measured again every time. Their entries are 0.
    """
    cache_file = CACHE_DIR / f"index-{_index_key(records, encoder)}.npy"
    if cache_file.is_file():
        rows = np.load(cache_file)
    else:
        rows = np.zeros((len(records), 5), dtype=np.int64)
    problems = []
    missing = np.flatnonzero(rows[:, 0] == 0)
    for i, row in _run_all(_measure, "index", missing, records, encoder):
        if isinstance(row, str):
            problems.append(f"{records.where(i)}: {row}")
        else:
            rows[i] = row
    if len(missing) > len(problems):
        partial = cache_file.with_suffix(f".{os.getpid()}.npy")
        try:
            CACHE_DIR.mkdir(exist_ok=True)
            np.save(partial, rows)
            os.replace(partial, cache_file)
        except OSError as error:
            logger.warning(f"the index is not kept, and will be measured again: {error}")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    return Index(*rows.T), problems


def decode_all(records: Records, index: Index, encoder: SampleEncoder) -> list[str]:
    """Decode every indexed sample, in parallel, and return a list of problems."""
    numbers = np.flatnonzero(index.num_tokens > 0)
    results = _run_all(_decode, "decode", numbers, records, encoder)
    return [f"{records.where(i)}: {problem}" for i, problem in results if problem]


def _run_all(function, title: str, numbers: np.ndarray, records: Records, encoder) -> Iterator:
    """Yield (sample number, result of `function`) in order, with a progress bar."""
    numbers = numbers.tolist()
    num_workers = 0 if len(numbers) < MIN_SAMPLES_FOR_PROCESSES else _num_cores()
    loader = DataLoader(
        _Task(function, records, encoder),
        sampler=numbers,
        batch_size=16,
        collate_fn=list,
        **_worker_settings(num_workers) | {"worker_init_fn": _start_measuring},
    )
    # Closed as this function ends, however it does, which ends the processes.
    with contextlib.closing(result for results in loader for result in results) as results:
        bar = tqdm(
            results, title, len(numbers), leave=num_workers > 0, disable=None, unit=" samples"
        )
        yield from zip(numbers, bar)


def _start_measuring(worker_id: int) -> None:
    _start_worker(worker_id)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing has to be finished


@dataclass
class _Task(Dataset):
    """Sample number -> what `function` says of it."""

    function: Callable
    records: Records
    encoder: SampleEncoder

    def __getitem__(self, i: int):
        return self.function(self.encoder, self.records, i)


def _num_cores() -> int:
    """Return how many cores this process may use, where the system tells; else all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _measure(encoder: SampleEncoder, records: Records, i: int) -> tuple | str:
    try:
        return encoder.measure(records[i], records.folder(i))
    except ValueError as error:
        return str(error)


def _decode(encoder: SampleEncoder, records: Records, i: int) -> str | None:
    try:
        encoder.encode(records[i], records.folder(i))
    except ValueError as error:
        return str(error)
    return None


def _index_key(records: Records, encoder: SampleEncoder) -> str:
    key = hashlib.sha256(records.digest().encode())
    names = ("data_util", "sample_util", "media_source", "vision_util", "video_reader", "plan_util")
    for name in names:
        key.update((REPO_DIR / "util" / f"{name}.py").read_bytes())
    key.update(encoder.tokenizer.backend_tokenizer.to_str().encode())
    folders = [os.path.abspath(file.path) for file in records.files]
    settings = (encoder.chat_template, encoder.policy, encoder.supervise, folders, os.getcwd())
    settings += (type(encoder.processor).__name__,)
    key.update(repr(settings).encode())
    return key.hexdigest()[:20]


def check_lengths(records: Records, index: Index, max_tokens: int, encoder) -> list[str]:
    """Return a problem for every sample that does not fit into one forward pass."""
    capacity = max_tokens - encoder.num_dummy_tokens
    return [
        f"{records.where(i)}: has {index.num_tokens[i]} tokens ({index.num_image_tokens[i]} of "
        f"images, {index.num_video_tokens[i]} of videos), and with the dummy segment of "
        f"{encoder.num_dummy_tokens} that is more than --max_tokens {max_tokens}: raise it, lower "
        "--max_pixels, --video_fps, --video_max_frames or --video_max_pixels, or shorten the sample"
        for i in np.flatnonzero(index.num_tokens > capacity).tolist()
    ]


def raise_problems(problems: list[str], most: int = 10) -> None:
    """Raise UserError with the first problems, where there are any."""
    if problems:
        more = f"\n... and {len(problems) - most} more" if len(problems) > most else ""
        raise UserError("\n".join(problems[:most]) + more)


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Step:
    """One optimizer step: for each rank, micro-batches as lists of sample numbers."""

    global_step: int
    epoch: int
    samples: list[int]
    micro_batches: list[list[list[int]]]
    num_tokens: int
    num_supervised_tokens: int


class Plan:
    """Lays out the whole run: a pure function of the index, the flags and the number of ranks.

    An epoch is one permutation of its samples, given by (seed, epoch), cut into steps of
    `batch_size`; its last step may be shorter. `capacity` is the tokens of samples that fit into
    one micro-batch: --max_tokens less the dummy segment; longer samples and those of no tokens
    are left out. `groups` are (first, last, rate): of each data file an epoch takes `rate` times
    its number of samples, others in every epoch.
    """

    def __init__(self, index, batch_size, capacity, seed, world_size, groups=None):
        self.index, self.batch_size, self.capacity = index, batch_size, capacity
        self.seed, self.world_size = seed, world_size
        usable = (index.num_tokens > 0) & (index.num_tokens <= capacity)
        # For each data file: its usable samples, and how many of them an epoch takes.
        self.groups = []
        for first, last, rate in groups or [(0, len(index), 1.0)]:
            numbers = first + np.flatnonzero(usable[first:last])
            # However low the rate, no file is left out altogether.
            self.groups.append((numbers, max(round(rate * len(numbers)), min(1, len(numbers)))))
        self.num_samples_per_epoch = sum(count for _, count in self.groups)
        self.num_steps_per_epoch = -(-self.num_samples_per_epoch // batch_size)
        self._order = (None, None)

    def step(self, global_step: int) -> Step:
        """Return step number `global_step`, counted from 0 over all epochs."""
        epoch, i = divmod(global_step, self.num_steps_per_epoch)
        samples = self._epoch_order(epoch)[i * self.batch_size : (i + 1) * self.batch_size]
        return Step(
            global_step,
            epoch,
            samples.tolist(),
            self._deal(samples.tolist()),
            int(self.index.num_tokens[samples].sum()),
            int(self.index.num_supervised_tokens[samples].sum()),
        )

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yield steps `first` up to, without, `last`."""
        return (self.step(i) for i in range(first, last))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            chosen = []
            for numbers, count in self.groups:
                rounds = -(-count // len(numbers)) if count else 0
                drawn = [generator.permutation(numbers) for _ in range(rounds)]
                chosen.append(np.concatenate([numbers[:0], *drawn])[:count])
            self._order = (epoch, generator.permutation(np.concatenate(chosen)))
        return self._order[1]

    def _deal(self, samples: list[int]) -> list[list[list[int]]]:
        """Give every rank about as many tokens, and the same number of micro-batches."""
        num_tokens = self.index.num_tokens
        longest_first = sorted(samples, key=lambda i: (-num_tokens[i], i))
        hands = [[] for _ in range(self.world_size)]
        loads = [0] * self.world_size
        for i in longest_first:
            rank = loads.index(min(loads))
            hands[rank].append(i)
            loads[rank] += int(num_tokens[i])
        micro_batches = [self._pack(hand) for hand in hands]
        most = max(len(bins) for bins in micro_batches)
        # An empty micro-batch holds only the dummy segment.
        return [bins + [[]] * (most - len(bins)) for bins in micro_batches]

    def _pack(self, longest_first: list[int]) -> list[list[int]]:
        """First-fit decreasing into micro-batches of at most `capacity` tokens."""
        bins, free = [], []
        for i in longest_first:
            length = int(self.index.num_tokens[i])
            for k, room in enumerate(free):
                if length <= room:
                    bins[k].append(i)
                    free[k] -= length
                    break
            else:
                bins.append([i])
                free.append(self.capacity - length)
        return bins


# ---------------------------------------------------------------- micro-batches


@dataclass
class MicroBatch:
    """Several samples and the dummy segment in one row of T tokens, without padding.

    input_ids (1, T) int64, videos under the image placeholder; position_ids (3, 1, T) int64,
    M-RoPE; patches (num_patches, patch_dim) uint8; vision_inputs: see there; supervised_positions
    (K,) int64: where logits are needed; targets (K,) int64: the tokens that follow there;
    cu_seqlens int32: where segments begin and end. image_grid_thw (num_media, 3) int64 stays on
    the CPU, as the model reads it there. problems: messages of samples left out.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    patches: torch.Tensor
    image_grid_thw: torch.Tensor
    vision_inputs: dict[str, torch.Tensor]
    supervised_positions: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    problems: list[str] = field(default_factory=list)

    def pin_memory(self) -> "MicroBatch":
        """Return a copy in page-locked memory; the DataLoader calls it."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is torch.Tensor}
        pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        vision_inputs = {name: tensor.pin_memory() for name, tensor in self.vision_inputs.items()}
        return replace(self, vision_inputs=vision_inputs, **pinned)


def pack(samples: list[Sample], encoder: SampleEncoder) -> MicroBatch:
    """Put samples one after the other into one micro-batch, the dummy segment last."""
    samples = [*samples, encoder.dummy()]
    lengths = [len(sample.input_ids) for sample in samples]
    input_ids = torch.cat([sample.input_ids for sample in samples])
    # Their positions are known now, so clips can pass as pictures of several frames: the vision
    # tower is called once, for everything, in order of appearance.
    input_ids[input_ids == encoder.video_token_id] = encoder.image_token_id
    labels = torch.cat([sample.labels for sample in samples])
    supervised_positions = torch.nonzero(labels[1:] != IGNORE)[:, 0]
    image_grid_thw = torch.tensor([grid for sample in samples for grid in sample.grids])
    return MicroBatch(
        input_ids=input_ids[None],
        position_ids=torch.cat([sample.position_ids for sample in samples], dim=1)[:, None],
        patches=torch.cat([sample.patches for sample in samples]),
        image_grid_thw=image_grid_thw,
        vision_inputs=vision_inputs(image_grid_thw, encoder.vision_tower),
        supervised_positions=supervised_positions,
        targets=labels[supervised_positions + 1],
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    )


def vision_inputs(grids: torch.Tensor, vision_tower) -> dict[str, torch.Tensor]:
    """Return what a vision tower computes of patch grids (num_media, 3), by its names for it.

    position_ids (num_patches, 2) int64; cu_seqlens int32: where frames begin and end. Qwen2.5-VL:
    window_index (num_tokens,) int64, an order of windows, cu_window_seqlens int32. Qwen3-VL:
    interp_indices int64 and interp_weights (num_patches, 4), into its table of positions.
    """
    merge_size = vision_tower.spatial_merge_size
    inputs = {
        "position_ids": get_vision_position_ids(grids, merge_size),
        "cu_seqlens": get_vision_cu_seqlens(grids),
    }
    if hasattr(vision_tower, "window_size"):
        inputs["window_index"], inputs["cu_window_seqlens"] = get_vision_window_index(
            grids, merge_size, vision_tower.window_size, vision_tower.patch_size
        )
    if hasattr(vision_tower, "num_grid_per_side"):
        inputs["interp_indices"], inputs["interp_weights"] = (
            get_vision_interpolation_indices_and_weights(
                grids,
                vision_tower.num_grid_per_side,
                vision_tower.interpolation_mode,
                vision_tower.interpolation_align_corners,
                merge_size,
            )
        )
    return inputs


# ---------------------------------------------------------------- the loader


class StaleIndex(str):
    """Says which sample is not what it was when it was indexed: no plan can hold with it."""


class SampleDataset(Dataset):
    """Sample number -> Sample, or the error message where it cannot be had."""

    def __init__(self, records: Records, index: Index, encoder: SampleEncoder):
        self.records, self.index, self.encoder = records, index, encoder

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i: int) -> Sample | str:
        try:
            sample = self.encoder.encode(self.records[i], self.records.folder(i))
        except ValueError as error:
            return f"{self.records.where(i)}: {error}"
        if len(sample.input_ids) != self.index.num_tokens[i]:
            return StaleIndex(
                f"{self.records.where(i)}: has {len(sample.input_ids)} tokens now, but "
                f"{self.index.num_tokens[i]} when it was indexed: its media have changed. Delete "
                f"{CACHE_DIR}/index-*.npy and start again"
            )
        return sample

    def collate(self, samples: list[Sample | str]) -> MicroBatch:
        """Pack the samples that could be read; the messages of the others go along."""
        micro_batch = pack([s for s in samples if not isinstance(s, str)], self.encoder)
        micro_batch.problems = [s for s in samples if isinstance(s, str)]
        return micro_batch


@dataclass
class PlannedData:
    """Data files, measured and laid out: what a loop needs to know of them."""

    samples: SampleDataset
    index: Index
    plan: Plan
    digest: str  # of the content of the files, and which samples of them are used
    problems: list[str]  # why samples are left out of the plan


def prepare_data(names: list[str], encoder: SampleEncoder, config, world_size: int) -> PlannedData:
    """Index and plan the data files `names`.

    One rank measures for all: others could find other samples bad, and have other plans.

    Raises UserError with what is wrong with them; with --on_bad_sample skip, only where nothing
    is left.
    """
    records = Records(names)
    index, problems = on_main_process(build_index, records, encoder)
    problems += check_lengths(records, index, config.max_tokens, encoder)
    if config.on_bad_sample == "stop":
        raise_problems(problems)
    capacity = config.max_tokens - encoder.num_dummy_tokens
    plan = Plan(index, config.batch_size, capacity, config.seed, world_size, records.groups())
    if plan.num_samples_per_epoch == 0:
        raise_problems(["no sample is left to train on", *problems])
    samples = SampleDataset(records, index, encoder)
    digest = hashlib.sha256(records.digest().encode())
    for numbers, _ in plan.groups:  # which samples are used, and how long they are
        digest.update(np.ascontiguousarray([numbers, index.num_tokens[numbers]]).tobytes())
    return PlannedData(samples, index, plan, digest.hexdigest(), problems)


def load_micro_batches(
    data: PlannedData, first_step: int, last_step: int, config, device: torch.device, rank: int
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of steps `first_step` up to, without, `last_step`, for one rank.

    Worker processes read ahead. Samples that cannot be read are left out, their messages in
    `problems`.
    """
    steps = data.plan.steps(first_step, last_step)
    yield from DataLoader(
        data.samples,
        batch_sampler=(samples for step in steps for samples in step.micro_batches[rank]),
        collate_fn=data.samples.collate,
        pin_memory=device.type == "cuda",
        **_worker_settings(config.num_workers),
    )


def first_fatal(problems: list[str], config) -> str | None:
    """Return the first problem with which a run may not go on, or None."""
    is_stop = config.on_bad_sample == "stop"
    return next((p for p in problems if is_stop or isinstance(p, StaleIndex)), None)


def explain_stop(step: Step, loss: float, grad_norm: float, bad_sample: str | None) -> UserError:
    """Return why a run stops in a step: a sample that cannot be read, or numbers not finite."""
    if bad_sample:
        return explain_bad_sample(bad_sample)
    return UserError(
        f"step {step.global_step + 1}: loss {loss}, gradient norm {grad_norm}: stopped before the "
        f"weights change. Samples of this step: {step.samples}. Look at them (check_data.py "
        "--show N), lower --learning_rate, or try --precision fp32"
    )


def explain_bad_sample(problem: str) -> UserError:
    """Return what to do about a sample that only decoding has shown to be bad."""
    if isinstance(problem, StaleIndex):
        return UserError(problem)
    return UserError(
        f"{problem}. Put it right, at the same size, or use --on_bad_sample skip; if steps are "
        "saved, with --resume_from latest. check_data.py --decode finds all such samples"
    )


class Stopwatch:
    """An iterator that adds up how long it was waited for."""

    def __init__(self, iterator: Iterator):
        self._iterator, self._seconds = iterator, 0.0

    def __iter__(self):
        return self

    def __next__(self):
        started = time.perf_counter()
        item = next(self._iterator)
        self._seconds += time.perf_counter() - started
        return item

    def take_seconds(self) -> float:
        """Return the seconds since the last call of this."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _worker_settings(num_workers: int) -> dict:
    """Return what DataLoaders of this repo have in common."""
    return {
        "num_workers": num_workers,
        "worker_init_fn": _start_worker,
        # A mapped file goes to no process that is started in another way.
        "multiprocessing_context": "fork" if num_workers else None,
        # Its own, so that reading data never moves the random state of the training.
        "generator": torch.Generator(),
    }


def _start_worker(worker_id: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # These reach every process of a terminal or a job; the main one decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
