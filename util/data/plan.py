"""The plan: the whole run laid out as steps, and for each rank its micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from util.config import UserError


@dataclass(frozen=True)
class Step:
    """One optimizer step: for each rank, micro-batches as lists of sample numbers."""

    global_step: int
    epoch: int
    samples: list[int]
    micro_batches: list[list[list[int]]]
    num_tokens: int
    num_supervised_tokens: int

    def refuse(self, loss: float, grad_norm: float) -> None:
        """Raise UserError with what to do about a step whose numbers are not finite."""
        raise UserError(
            f"step {self.global_step + 1}: loss {loss}, gradient norm {grad_norm}: stopped before "
            f"the weights change. Samples of this step: {self.samples}. Look at them "
            "(check_data.py --show N), lower --learning_rate, or try --precision fp32"
        )


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

    def num_steps(self, num_epochs: int, max_steps: int | None) -> int:
        """Return the steps of a run of so many epochs, at most `max_steps`."""
        num_steps = self.num_steps_per_epoch * num_epochs
        return min(num_steps, max_steps or num_steps)

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
