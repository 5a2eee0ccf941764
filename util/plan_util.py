"""From samples to steps: the index, the plan, packed micro-batches, and the loader.

index: what is known of every sample before the first step
plan: the whole run, laid out: steps, and for each the micro-batches of every rank
micro-batch: several samples in one row, without padding
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from util.config import UserError
from util.data_util import IGNORE, Sample, SampleEncoder

REPO_DIR = Path(__file__).resolve().parent.parent
CACHE_DIR = REPO_DIR / ".cache"
# Below so many samples, starting processes takes longer than measuring.
MIN_SAMPLES_FOR_PROCESSES = 256

# ---------------------------------------------------------------- the index


@dataclass
class Index:
    """What is known of every sample before the first step: int32 arrays, one entry a sample."""

    num_tokens: np.ndarray
    num_supervised_tokens: np.ndarray
    num_image_tokens: np.ndarray
    num_video_tokens: np.ndarray

    def __len__(self):
        return len(self.num_tokens)

    def summary(self) -> str:
        """Return one line on how much data this is."""
        return (
            f"{len(self):,} samples of {self.num_tokens.min():,} to {self.num_tokens.max():,} "
            f"tokens, {self.num_tokens.sum():,} in all: {self.num_image_tokens.sum():,} of images, "
            f"{self.num_video_tokens.sum():,} of videos, {self.num_supervised_tokens.sum():,} "
            "supervised"
        )


def build_index(path: str, records: list, encoder: SampleEncoder) -> tuple[Index, list[str]]:
    """Measure every sample, in parallel, and return the index and a list of problems.

    The index of data without problems is kept on disk, under a key of everything that it
    depends on except the media files themselves: a sample whose media have changed since is
    refused when it is read.
    """
    cache_file = CACHE_DIR / f"index-{_index_key(path, encoder)}.npz"
    if cache_file.is_file():
        with np.load(cache_file) as arrays:
            return Index(**arrays), []
    rows, problems = [], []
    if len(records) < MIN_SAMPLES_FOR_PROCESSES:
        pool, measured = nullcontext(), (_measure(encoder, record) for record in records)
    else:
        pool = get_context("fork").Pool(os.cpu_count(), _start_measuring, (encoder, records))
        measured = pool.imap(_measure_number, range(len(records)), chunksize=32)
    with pool:
        bar = tqdm(measured, "index", len(records), leave=False, disable=None, unit="sample")
        for i, row in enumerate(bar):
            if isinstance(row, str):
                problems.append(f"{path}: sample {i}: {row}")
                row = (0, 0, 0, 0)
            rows.append(row)
    index = Index(*np.array(rows, dtype=np.int32).T)
    if not problems:
        CACHE_DIR.mkdir(exist_ok=True)
        partial = cache_file.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **asdict(index))
        os.replace(partial, cache_file)
    return index, problems


def _measure(encoder: SampleEncoder, record) -> tuple | str:
    try:
        return encoder.measure(record)
    except ValueError as error:
        return str(error)


_measuring = None  # (encoder, records), set once in each process of the pool


def _start_measuring(*encoder_and_records) -> None:
    global _measuring
    torch.set_num_threads(1)
    _measuring = encoder_and_records


def _measure_number(i: int) -> tuple | str:
    encoder, records = _measuring
    return _measure(encoder, records[i])


def _index_key(path: str, encoder: SampleEncoder) -> str:
    key = hashlib.sha256()
    names = ("data_util", "media_source", "vision_util", "video_reader", "plan_util")
    code = [REPO_DIR / "util" / f"{name}.py" for name in names]
    for source in (Path(path), *code):
        key.update(source.read_bytes())
    key.update(encoder.tokenizer.backend_tokenizer.to_str().encode())
    settings = (encoder.chat_template, encoder.policy, encoder.supervise, Path(path).absolute())
    key.update(repr((*settings, os.getcwd())).encode())
    return key.hexdigest()[:20]


def check_lengths(path: str, index: Index, max_tokens: int, encoder) -> list[str]:
    """Return a problem for every sample that does not fit into one forward pass."""
    return [
        f"{path}: sample {i} has {index.num_tokens[i]} tokens ({index.num_image_tokens[i]} of "
        f"images, {index.num_video_tokens[i]} of videos), and with the dummy segment of "
        f"{encoder.num_dummy_tokens} that is more than --max_tokens {max_tokens}: raise it, lower "
        "--max_pixels, --video_fps, --video_max_frames or --video_max_pixels, or shorten the sample"
        for i in np.flatnonzero(index.num_tokens > max_tokens - encoder.num_dummy_tokens)
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

    An epoch is one permutation of all samples, given by (seed, epoch), cut into steps of
    `batch_size`; its last step may be shorter. `capacity` is the tokens of samples that fit into
    one micro-batch: --max_tokens less the dummy segment.
    """

    def __init__(self, index: Index, batch_size: int, capacity: int, seed: int, world_size: int):
        self.index, self.batch_size, self.capacity = index, batch_size, capacity
        self.seed, self.world_size = seed, world_size
        self.num_steps_per_epoch = -(-len(index) // batch_size)
        self._permutation = (None, None)

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
        if self._permutation[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.index))
            self._permutation = (epoch, order)
        return self._permutation[1]

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

    input_ids (1, T) int64, videos under the image placeholder; position_ids (4, 1, T) int64: row
    0 restarts at 0 for every segment, rows 1-3 are M-RoPE; patches (num_patches, patch_dim)
    uint8; vision_position_ids (num_patches, 2) int64; supervised_positions (K,) int64: where
    logits are needed; targets (K,) int64: the tokens that follow there; cu_seqlens and
    vision_cu_seqlens int32: where segments begin and end. image_grid_thw (num_media, 3) int64
    stays on the CPU, as the model reads it there.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    patches: torch.Tensor
    image_grid_thw: torch.Tensor
    vision_position_ids: torch.Tensor
    supervised_positions: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    vision_cu_seqlens: torch.Tensor

    def pin_memory(self) -> "MicroBatch":
        """Return a copy in page-locked memory; the DataLoader calls it."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


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
    restarting = torch.cat([torch.arange(length) for length in lengths])
    mrope = torch.cat([sample.position_ids for sample in samples], dim=1)
    image_grid_thw = torch.tensor([grid for sample in samples for grid in sample.grids])
    return MicroBatch(
        input_ids=input_ids[None],
        position_ids=torch.cat([restarting[None], mrope])[:, None],
        patches=torch.cat([sample.patches for sample in samples]),
        image_grid_thw=image_grid_thw,
        vision_position_ids=get_vision_position_ids(image_grid_thw, encoder.policy.merge_size),
        supervised_positions=supervised_positions,
        targets=labels[supervised_positions + 1],
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        vision_cu_seqlens=get_vision_cu_seqlens(image_grid_thw),
    )


# ---------------------------------------------------------------- the loader


class SampleDataset(Dataset):
    """Sample number -> Sample, or the error message where it cannot be had."""

    def __init__(self, path: str, records: list, index: Index, encoder: SampleEncoder):
        self.path, self.records, self.index, self.encoder = path, records, index, encoder

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i: int) -> Sample | str:
        try:
            sample = self.encoder.encode(self.records[i])
        except ValueError as error:
            return f"{self.path}: sample {i}: {error}"
        if len(sample.input_ids) != self.index.num_tokens[i]:
            return (
                f"{self.path}: sample {i} now has {len(sample.input_ids)} tokens, but "
                f"{self.index.num_tokens[i]} when it was indexed: its media have changed. Delete "
                f"{CACHE_DIR}/index-*.npz and start again"
            )
        return sample

    def collate(self, samples: list[Sample | str]) -> MicroBatch | str:
        """Pack samples, or pass on the first error message among them."""
        errors = [sample for sample in samples if isinstance(sample, str)]
        return errors[0] if errors else pack(samples, self.encoder)


def load_micro_batches(
    dataset: SampleDataset, steps: Iterator[Step], rank: int, num_workers: int, pin_memory: bool
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of `steps` for one rank, read ahead by worker processes.

    Raises UserError with the message of the first sample that cannot be read.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=(samples for step in steps for samples in step.micro_batches[rank]),
        collate_fn=dataset.collate,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
    )
    for micro_batch in loader:
        if isinstance(micro_batch, str):
            raise UserError(micro_batch)
        yield micro_batch


def _start_worker(worker_id: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches every process of the terminal; the main process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
