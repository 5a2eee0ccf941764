"""Samples per second from files to model inputs, against transformers' own processor.

    python benchmarks/bench_input.py

Makes photographs and clips in a temporary folder. A sample is one of them, a question and an
answer: read, decoded, resized, cut into patches, tokenized. The first pass over new data is
measured too: it takes sizes from headers and packets, on all cores.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks.clips import PHOTO, make_clip  # noqa: E402
from util.config import DEFAULTS, Config, fill_defaults  # noqa: E402
from util.data import index as index_module  # noqa: E402
from util.data.files import Records  # noqa: E402
from util.model.inputs import InputBuilder  # noqa: E402
from util.model.load import build_encoder, load_processor  # noqa: E402
from util.model.tiny import cached_tiny_model  # noqa: E402

PHOTO_SIZE = (1600, 1200)  # width, height


def make_data(folder: Path) -> dict[str, list[dict]]:
    """Write media and return conversations about photographs and about clips."""
    photo = Image.open(PHOTO).convert("RGB").resize(PHOTO_SIZE)
    photo.save(folder / "photo.jpg", quality=90)
    clip = make_clip(str(folder / "clip.mp4"), height=480, width=854, seconds=10)
    sources = {"image": str(folder / "photo.jpg"), "video": clip}
    return {kind: conversation(kind, source) for kind, source in sources.items()}


def conversation(kind: str, source: str) -> list[dict]:
    question = {"type": "text", "text": "What do you see here? Describe it in a sentence."}
    return [
        {"role": "user", "content": [{"type": kind, kind: source}, question]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup of coffee on a table."}]},
    ]


def samples_per_second(samples, num_samples: int) -> float:
    """Consume samples; the first, which starts processes and fills caches, is not counted."""
    samples = iter(samples)
    next(samples)
    start = time.perf_counter()
    for _ in range(num_samples):
        next(samples)
    return num_samples / (time.perf_counter() - start)


def measure(kind: str, messages: list[dict], num_samples: int, rounds: int) -> None:
    """Print samples per second of every way for one kind of media; the best round counts."""
    folder = cached_tiny_model()
    pixels = {name: DEFAULTS[name] for name in ("max_pixels", "video_max_pixels")}
    config = fill_defaults(Config(model_name_or_path="tiny", **pixels), "cpu")
    processor = load_processor(folder, config)
    encoder = build_encoder(folder, processor, config)
    normalize = InputBuilder(processor, "sdpa", torch.device("cpu")).normalize

    def encode(_):
        return encoder.encode({"messages": messages})

    def own_path(_):
        options = {"return_tensors": "pt"}
        if kind == "video":
            options |= {"do_sample_frames": True, "fps": config.video_fps}
        return processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, processor_kwargs=options
        )

    def loader(num_workers: int):
        items = [None] * (num_samples + 1)
        return DataLoader(items, batch_size=1, collate_fn=encode, num_workers=num_workers)

    def forever(function):
        while True:
            yield function(None)

    patches = encode(None).patches
    ways = {
        "processor alone (float32 patches)": lambda: forever(own_path),
        "ours": lambda: forever(encode),
        "ours, normalized on the CPU (float32 patches)": lambda: (
            normalize(sample.patches) for sample in forever(encode)
        ),
        **{f"ours, DataLoader, {n} workers": lambda n=n: loader(n) for n in (0, 1, 2)},
    }
    print(f"\n{kind}: {len(patches)} patches a sample")
    for name, way in ways.items():
        try:
            best = max(samples_per_second(way(), num_samples) for _ in range(rounds))
            print(f"{name:48} {best:7.2f} samples/s", flush=True)
        except (ImportError, RuntimeError, ValueError) as error:
            print(f"{name:48} fails: {str(error).splitlines()[0][:60]}")


def measure_index(kind: str, messages: list[dict], folder: Path, num_samples: int) -> None:
    """Print the samples per second of the first pass over a JSONL file of unlike samples."""
    model = cached_tiny_model()
    config = fill_defaults(Config(model_name_or_path="tiny"), "cpu")
    encoder = build_encoder(model, load_processor(model, config), config)
    with (folder / f"{kind}.jsonl").open("w") as file:
        for i in range(num_samples):
            answer = {"role": "assistant", "content": f"A cup of coffee on table {i}. " * (i % 9)}
            print(json.dumps({"messages": [messages[0], answer]}), file=file)
    index_module.CACHE_DIR = folder
    start = time.perf_counter()
    index, problems = index_module.build_index(Records([str(folder / f"{kind}.jsonl")]), encoder)
    seconds = time.perf_counter() - start
    assert not problems and len(index) == num_samples
    print(f"first pass, {kind:36} {num_samples / seconds:7,.0f} samples/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_samples", type=int, default=20, help="samples in a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements; the best counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for kind, messages in data.items():
            measure(kind, messages, arguments.num_samples, arguments.rounds)
        question = {"role": "user", "content": "What do you see here? Describe it in a sentence."}
        for kind, messages in {"text": [question], **data}.items():
            measure_index(kind, messages, Path(folder), 1000 * arguments.num_samples)


if __name__ == "__main__":
    main()
