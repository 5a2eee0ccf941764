"""Feed random records and random lengths to the conversation parser and the packer.

    python benchmarks/fuzz.py records -max_total_time=300
    python benchmarks/fuzz.py packing -max_total_time=300

atheris mutates what goes in, towards lines of ours that have not run yet; what it takes is
libFuzzer's: a folder of inputs to keep, -runs=N, -seed=N. tests/ check the same two properties with
hypothesis.
"""

import inspect
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from util.config import Config, UserError, fill_defaults  # noqa: E402
from util.data import batch, conversation, files, plan  # noqa: E402
from util.data.batch import pack  # noqa: E402
from util.data.files import Records  # noqa: E402
from util.data.index import Index  # noqa: E402
from util.data.plan import Plan  # noqa: E402
from util.data.sample import IGNORE, Sample, SampleEncoder  # noqa: E402
from util.media import source  # noqa: E402
from util.model.load import build_encoder, load_processor  # noqa: E402
from util.model.tiny import cached_tiny_model  # noqa: E402

# What a message about a record begins with: the message in it, or what is wrong with all of it.
PLACES = re.compile(
    r"message \d+\b|must be an object|the conversation is empty|<\w+> tags in|both |\"\w+\" lists|"
    r"no assistant message|nothing to train|not valid JSON at column \d+|not UTF-8 text|"
    r"not JSON that Python can read"
)
# A picture of one pixel.
PICTURE = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAEAAAAALAAAAAABAAEAAAICRAEAOw=="
WORDS = [
    *("messages", "conversations", "role", "content", "from", "value", "type", "text", "image"),
    *("video", "images", "videos", "user", "assistant", "system", "human", "gpt", "<image>"),
    *("<video>\n", "a<image><image>", "<|im_end|>", "<|image_pad|>", "min_pixels", "max_pixels"),
    *("resized_height", "resized_width", "fps", "nframes", "video_start", "total_pixels"),
    *("/dev/zero", ".", "file://", "a\0b", "http://localhost/", "data:,", PICTURE, "\ud800", "😀"),
]
NUMBERS = [0, 1, -1, 28, 10**6, 10**12, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan")]
GOOD = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}]},
        {"role": "assistant", "content": "Yes."},
    ]
}


def check_file(encoder: SampleEncoder, content: bytes, path: Path) -> None:
    """A data file is refused, or each record gives a sample or an error that names the place."""
    path.write_bytes(content)
    try:
        records = Records([str(path)])
    except UserError as error:
        assert str(error).startswith(str(path)), error
        return
    for i in range(len(records)):
        try:
            measured = encoder.measure(records[i], path.parent)
        except ValueError as error:
            assert PLACES.match(str(error)), error
            str(error).encode()  # can be printed
        else:
            sample = encoder.encode(records[i], path.parent)
            num_supervised = int((sample.labels != IGNORE).sum())
            assert measured[:2] == (len(sample.input_ids), num_supervised)
            assert measured[1] > 0


def check_packing(encoder, lengths: list[int], batch_size, capacity, world_size, seed) -> None:
    """An epoch has every token of every sample once, in order, within the limit, on all ranks."""
    samples = [make_sample(encoder, i, length) for i, length in enumerate(lengths)]
    num_supervised = [int((sample.labels != IGNORE).sum()) for sample in samples]
    nothing = [0] * len(lengths)
    columns = (lengths, num_supervised, nothing, nothing, nothing)
    index = Index(*(np.array(column, dtype=np.int64) for column in columns))
    plan = Plan(index, batch_size, capacity, seed, world_size)
    seen = []
    for step in plan.steps(0, plan.num_steps_per_epoch):
        assert len(step.micro_batches) == world_size
        assert len({len(micro_batches) for micro_batches in step.micro_batches}) == 1
        num_targets = 0
        for numbers in (n for micro_batches in step.micro_batches for n in micro_batches):
            micro_batch = pack([samples[i] for i in numbers], encoder)
            check_micro_batch(micro_batch, [samples[i] for i in numbers], encoder)
            assert micro_batch.input_ids.shape[1] <= capacity + encoder.num_dummy_tokens
            num_targets += len(micro_batch.targets)
            seen += numbers
        assert num_targets == step.num_supervised_tokens
    assert sorted(seen) == [i for i, length in enumerate(lengths) if length <= capacity]


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


def check_micro_batch(micro_batch, samples: list[Sample], encoder: SampleEncoder) -> None:
    """What was packed can be unpacked: nothing is lost, doubled, or moved."""
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


# ---------------------------------------------------------------- random input


def random_json(data, levels: int = 5):
    """Return any value that JSON can hold, mostly of the words that records are made of."""
    kind = data.ConsumeIntInRange(0, 7 if levels else 4)
    if kind == 0:
        return data.ConsumeUnicode(6)
    if kind == 1:
        return data.PickValueInList(NUMBERS)
    if kind == 2:
        return data.PickValueInList([None, True, False])
    if kind <= 4:
        return data.PickValueInList(WORDS)
    count = data.ConsumeIntInRange(0, 4)
    if kind == 5:
        return [random_json(data, levels - 1) for _ in range(count)]
    return {data.PickValueInList(WORDS): random_json(data, levels - 1) for _ in range(count)}


def mutate(data, value):
    """Return a record with some of its parts replaced."""
    if data.ConsumeIntInRange(0, 5) == 0:
        return random_json(data, 2)
    if isinstance(value, list):
        return [mutate(data, one) for one in value for _ in range(data.PickValueInList([1, 1, 2]))]
    if isinstance(value, dict):
        more = {data.PickValueInList(WORDS): random_json(data, 2)}
        value = {key: mutate(data, one) for key, one in value.items()}
        return {**value, **more} if data.ConsumeIntInRange(0, 2) == 0 else value
    return value


def main() -> None:
    import atheris

    if len(sys.argv) < 2 or sys.argv[1] not in ("records", "packing"):
        sys.exit(__doc__)
    target = sys.argv.pop(1)
    folder = cached_tiny_model()
    config = fill_defaults(Config(model_name_or_path="tiny"), "cpu")
    encoder = build_encoder(folder, load_processor(folder, config), config)
    place = Path(tempfile.mkdtemp())

    def fuzz_records(content: bytes) -> None:
        data = atheris.FuzzedDataProvider(content)
        name, kind = data.PickValueInList(["a.json", "a.jsonl"]), data.ConsumeIntInRange(0, 3)
        if kind == 0:
            text = data.ConsumeBytes(data.remaining_bytes())
        else:
            record = random_json(data) if kind == 1 else mutate(data, GOOD)
            text = json.dumps([record] if name == "a.json" else record).encode()
        check_file(encoder, text, place / name)

    def fuzz_packing(content: bytes) -> None:
        data = atheris.FuzzedDataProvider(content)
        settings = [data.ConsumeIntInRange(1, most) for most in (20, 900, 8, 3)]
        count = data.ConsumeIntInRange(1, 40)
        lengths = [data.ConsumeIntInRange(1, 300) for _ in range(count)]
        if min(lengths) <= settings[1]:
            check_packing(encoder, lengths, *settings)

    for owner in (conversation, files, source, batch, plan, Plan, Records):
        for function in list(vars(owner).values()):
            if inspect.isfunction(function) and function.__module__.startswith("util."):
                atheris.instrument_func(function)
    # Records are long from the start; what the user gives goes before.
    arguments = [sys.argv[0], "-len_control=0", "-max_len=3000", *sys.argv[1:]]
    atheris.Setup(arguments, fuzz_records if target == "records" else fuzz_packing)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
