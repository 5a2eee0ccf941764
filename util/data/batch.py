"""Micro-batches: several samples in one row, without padding, and the loader that makes them."""

import hashlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import islice

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, get_worker_info

from util.config import UserError
from util.data.files import DataHaveChanged, Records
from util.data.index import CACHE_DIR, Index, build_index, check_lengths, raise_problems
from util.data.plan import Plan
from util.data.sample import IGNORE, Sample, SampleEncoder
from util.data.workers import read_in_time, worker_settings
from util.run import on_main_process, rank, world_size


@dataclass
class MicroBatch:
    """Several samples and the dummy segment in one row of T tokens, without padding."""

    input_ids: torch.Tensor  # (1, T) int64, videos under the image placeholder
    position_ids: torch.Tensor  # (3, 1, T) int64, M-RoPE
    media_positions: torch.Tensor  # (M,) int64: where image placeholders are
    patches: torch.Tensor  # (num_patches, patch_dim) uint8
    image_grid_thw: torch.Tensor  # (num_media, 3) int64, stays on the CPU, where the model reads it
    vision_inputs: dict[str, torch.Tensor]  # see util/model/families.py
    supervised_positions: torch.Tensor  # (K,) int64: where logits are needed
    targets: torch.Tensor  # (K,) int64: the tokens that follow there
    cu_seqlens: torch.Tensor  # int32: where segments begin and end
    problems: list[str] = field(default_factory=list)  # messages of samples left out

    def pin_memory(self) -> "MicroBatch":
        """Return a copy in page-locked memory; the DataLoader calls it."""
        return self.map(lambda tensor: torch.as_tensor(tensor).pin_memory())

    def to_share(self) -> "MicroBatch":
        """Return a copy that another process can take over.

        In shared memory, of which Docker gives 64 MiB unless asked for more. What does not fit is
        made an array, which goes through a pipe.
        """

        def share(tensor):
            try:
                return tensor.share_memory_()
            except RuntimeError:
                return tensor.numpy()

        return self.map(share)

    def map(self, function) -> "MicroBatch":
        """Return a copy with `function` applied to each tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is torch.Tensor}
        mapped = {name: function(tensor) for name, tensor in tensors.items()}
        vision_inputs = {name: function(tensor) for name, tensor in self.vision_inputs.items()}
        return replace(self, vision_inputs=vision_inputs, **mapped)


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
        media_positions=torch.nonzero(input_ids == encoder.image_token_id)[:, 0],
        patches=torch.cat([sample.patches for sample in samples]),
        image_grid_thw=image_grid_thw,
        vision_inputs=encoder.vision_inputs(image_grid_thw),
        supervised_positions=supervised_positions,
        targets=labels[supervised_positions + 1],
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    )


class FatalProblem(str):
    """Says why no step can go on, whatever --on_bad_sample is; the steps done can be saved."""


class SampleDataset(Dataset):
    """Sample number -> Sample, or the error message where it cannot be had."""

    def __init__(self, records: Records, index: Index, encoder: SampleEncoder):
        self.records, self.index, self.encoder = records, index, encoder

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i: int) -> Sample | str:
        try:
            sample = self.encoder.encode(self.records[i], self.records.folder(i))
        except DataHaveChanged as error:
            return FatalProblem(error)
        except ValueError as error:
            return f"{self.records.where(i)}: {error}"
        if len(sample.input_ids) != self.index.num_tokens[i]:
            return FatalProblem(
                f"{self.records.where(i)}: has {len(sample.input_ids)} tokens now, but "
                f"{self.index.num_tokens[i]} when it was indexed: its media have changed. Delete "
                f"{CACHE_DIR}/index-*.npy and start again"
            )
        return sample

    def collate(self, samples: list[Sample | str]) -> MicroBatch:
        """Pack the samples that could be read; the messages of the others go along."""
        micro_batch = pack([s for s in samples if not isinstance(s, str)], self.encoder)
        micro_batch.problems = [s for s in samples if isinstance(s, str)]
        return micro_batch if get_worker_info() is None else micro_batch.to_share()


@dataclass
class PlannedData:
    """Data files, measured and laid out: what a loop needs to know of them."""

    samples: SampleDataset
    index: Index
    plan: Plan
    digest: str  # of the content of the files, and which samples of them are used
    problems: list[str]  # why samples are left out of the plan


def prepare_data(names: list[str], encoder: SampleEncoder, config) -> PlannedData:
    """Index and plan the data files `names`.

    One rank measures for all: others could find other samples bad, and have other plans. Raises
    UserError with what is wrong with them; with --on_bad_sample skip, where nothing is left.
    """
    records = Records(names)
    _refuse_unlike_ranks(records.digest() + encoder.digest(), names)
    index, problems = on_main_process(build_index, records, encoder)
    records.refuse_changes()  # while they were measured
    problems += check_lengths(records, index, config.max_tokens, encoder)
    if config.on_bad_sample == "stop":
        raise_problems(problems)
    capacity = config.max_tokens - encoder.num_dummy_tokens
    plan = Plan(index, config.batch_size, capacity, config.seed, world_size(), records.groups())
    if plan.num_samples_per_epoch == 0:
        raise_problems(["no sample is left to train on", *problems])
    samples = SampleDataset(records, index, encoder)
    digest = hashlib.sha256(records.digest().encode())
    for numbers, _ in plan.groups:  # which samples are used, and how long they are
        digest.update(np.ascontiguousarray([numbers, index.num_tokens[numbers]]).tobytes())
    return PlannedData(samples, index, plan, digest.hexdigest(), problems)


def _refuse_unlike_ranks(digest: str, names: list[str]) -> None:
    """Raise UserError where a rank has other data, or a model folder that reads them otherwise.

    It would lay out another plan, or train another text.
    """
    if world_size() == 1:
        return
    digests = gather_object([(digest, socket.gethostname())])
    unlike = [f"{i} ({host})" for i, (other, host) in enumerate(digests) if other != digests[0][0]]
    if unlike:
        raise UserError(
            f"{' '.join(names)}: these files, or tokenizer and chat template of the model, are not "
            f"the same on all machines: rank {', '.join(unlike)} unlike rank 0 ({digests[0][1]}). "
            "Copy both anew, or use a disk that all machines share"
        )


def load_micro_batches(
    data: PlannedData, first_step: int, last_step: int, config, device: torch.device
) -> "Stopwatch":
    """Iterate over the micro-batches of steps `first_step` up to, without, `last_step`.

    Those of this rank. Worker processes read ahead, once the first one is asked for. Samples that
    cannot be read are left out, their messages in `problems`.
    """

    def batches():
        steps = data.plan.steps(first_step, last_step)
        return (samples for step in steps for samples in step.micro_batches[rank()])

    def read():
        loader = DataLoader(
            data.samples,
            batch_sampler=batches(),
            collate_fn=data.samples.collate,
            pin_memory=device.type == "cuda",
            **worker_settings(config.num_workers),
        )
        num_read = 0
        try:
            for micro_batch in read_in_time(loader, batches(), data.samples.records):
                yield micro_batch.map(torch.as_tensor)  # of what to_share has made arrays
                num_read += 1
        except UserError as error:
            # Told as a sample that cannot be read is, so that all ranks save the steps done.
            for _ in islice(batches(), num_read, None):
                yield data.samples.collate([FatalProblem(error)])

    return Stopwatch(read())


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


def refuse_bad_samples(problems: list[str], config, num_samples: int | None = None) -> None:
    """Raise UserError with what to do about samples that only decoding has shown to be bad.

    Not where --on_bad_sample says to leave them out, unless they are all the `num_samples` of a
    step.
    """
    for problem in problems:
        if isinstance(problem, FatalProblem):
            raise UserError(problem)
        if config.on_bad_sample == "stop":
            raise UserError(
                f"{problem}. Put it right, at the same size, or use --on_bad_sample skip; if steps "
                "are saved, with --resume_from latest. check_data.py --decode finds all such "
                "samples"
            )
    if problems and len(problems) == num_samples:
        raise UserError(
            f"none of the {num_samples} samples of a step can be read: are the media still there? "
            f"{problems[0]}"
        )
