"""A packed micro-batch gives what each of its samples gives alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import encoder_for, set_up, tiny_config
from util.data.batch import pack
from util.data.sample import IGNORE, Sample, SampleEncoder


@pytest.fixture(scope="module")
def run(mixed_data, tiny_folder):
    return set_up(tiny_config(train_data=[mixed_data]), tiny_folder)


def make_sample(encoder: SampleEncoder, number: int, length: int) -> Sample:
    """Return a sample of tokens that no other has, some supervised; every third has a picture."""
    generator = torch.Generator().manual_seed(number)
    input_ids = torch.arange(length) + 1_000_000 * (number + 1)
    is_supervised = torch.rand(length, generator=generator) < 0.5
    is_supervised[0] = False
    grids = [(1, 2, 2)] if number % 3 == 0 else []
    shape = (4 * len(grids), encoder.policy.patch_dim)
    return Sample(
        input_ids,
        torch.where(is_supervised, input_ids, IGNORE),
        torch.randint(0, 99, (3, length), generator=generator),
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        grids,
        ["image"] * len(grids),
        [],
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=30))
def test_packing_keeps_every_token_once_and_in_order(tiny_folder, lengths):
    """What was packed can be unpacked: nothing is lost, doubled, or moved."""
    encoder = encoder_for(tiny_folder)
    samples = [make_sample(encoder, i, length) for i, length in enumerate(lengths)]
    micro_batch = pack(samples, encoder)
    samples = [*samples, encoder.dummy()]
    lengths = [len(sample.input_ids) for sample in samples]
    assert micro_batch.cu_seqlens.diff().tolist() == lengths
    labels = torch.full((sum(lengths),), IGNORE)
    labels[micro_batch.supervised_positions + 1] = micro_batch.targets
    columns = (micro_batch.input_ids[0], labels, micro_batch.position_ids[:, 0].T)
    for sample, ids, targets, positions in zip(samples, *(c.split(lengths) for c in columns)):
        assert torch.equal(ids, sample.input_ids) and torch.equal(targets, sample.labels)
        assert torch.equal(positions, sample.position_ids.T)
    assert torch.equal(micro_batch.patches, torch.cat([sample.patches for sample in samples]))
    assert micro_batch.image_grid_thw.tolist() == [list(g) for s in samples for g in s.grids]


def test_segments_of_one_length_are_one_call(run, monkeypatch):
    """Frames of a video side by side: a call a layer, and not a call a frame and layer."""
    samples = [run.encoder.encode(run.records[i]) for i in (4, 4)]  # of a video each
    micro_batch, shapes = pack(samples, run.encoder), []
    num_frames = [t for sample in samples for t, _, _ in sample.grids]
    assert min(num_frames) > 1
    attend = F.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        shapes.append(tuple(query.shape[:2]))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    with torch.no_grad():
        run.model(**run.build_inputs(micro_batch))
    vision, text = run.model.config.vision_config, run.model.config.text_config
    # After the samples comes what fills up: a token, and a picture of one frame.
    of_vision = [(sum(num_frames), vision.num_heads), (1, vision.num_heads)]
    of_text = [(2, text.num_attention_heads), (1, text.num_attention_heads)]
    assert shapes == of_vision * vision.depth + of_text * text.num_hidden_layers
