"""The plan by itself: no model, no data."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from util.data.index import Index
from util.data.plan import Plan


def make_index(lengths):
    lengths = np.array(lengths, dtype=np.int32)
    return Index(lengths, lengths // 2 + 1, *[lengths * 0] * 4)


# Some are longer than any limit, and left out.
lengths = st.lists(st.integers(2, 300) | st.just(2 * 10**9), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 20), st.integers(300, 900), st.integers(1, 8), st.integers(0, 3))
def test_every_epoch_holds_every_sample_once(lengths, batch_size, capacity, world_size, seed):
    index = make_index(lengths)
    plan = Plan(index, batch_size, capacity, seed, world_size)
    fitting = [i for i, length in enumerate(lengths) if length <= capacity]
    single = Plan(index, batch_size, 10**9, seed, 1)
    assert plan.num_steps_per_epoch == single.num_steps_per_epoch
    for epoch in range(2):
        first = epoch * plan.num_steps_per_epoch
        seen = []
        for step in plan.steps(first, first + plan.num_steps_per_epoch):
            assert plan.step(step.global_step) == step  # found without those before it
            # The same step whatever the ranks and the memory.
            expected = single.step(step.global_step)
            assert (step.samples, step.epoch) == (expected.samples, epoch)
            assert step.num_tokens == sum(lengths[i] for i in step.samples)
            assert step.num_supervised_tokens == expected.num_supervised_tokens
            assert len(step.micro_batches) == world_size
            assert len({len(rank) for rank in step.micro_batches}) == 1
            dealt = [i for rank in step.micro_batches for bin_ in rank for i in bin_]
            assert sorted(dealt) == sorted(step.samples)
            for rank in step.micro_batches:
                assert all(sum(lengths[i] for i in bin_) <= capacity for bin_ in rank)
            seen += step.samples
        assert sorted(seen) == fitting


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 300), min_size=16, max_size=64), st.integers(2, 8))
def test_ranks_get_about_as_many_tokens(lengths, world_size):
    plan = Plan(make_index(lengths), len(lengths), 10**6, 0, world_size)
    loads = [sum(lengths[i] for bin_ in rank for i in bin_) for rank in plan.step(0).micro_batches]
    assert max(loads) - min(loads) <= max(lengths)


def test_epochs_and_seeds_are_shuffled_differently():
    index = make_index([10] * 50)
    orders = [
        Plan(index, 50, 1000, seed, 1).step(epoch).samples
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3
