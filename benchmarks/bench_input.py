"""Samples per second from files to model inputs, against transformers' own processor.

    python -m benchmarks.bench_input
    python -m benchmarks.bench_input --num_samples 2 --rounds 1

Makes a photograph and a clip in a temporary folder. A sample is one of them, a question and an
answer: read, decoded, resized, cut into patches, tokenized. The first pass over new data is
measured too: it takes sizes from headers and packets, on all cores.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.clips import PHOTO, make_clip
from benchmarks.common import load_tiny, print_header, print_row
from util.config import DEFAULTS
from util.data import index as index_module
from util.data.files import Records
from util.model.inputs import InputBuilder

QUESTION = {"type": "text", "text": "What do you see here? Describe it in a sentence."}
ANSWER = [{"type": "text", "text": "A cup of coffee on a table."}]


def make_questions(folder: Path) -> dict[str, list[dict]]:
    """Write media; return the content of a question about text, a photograph and a clip."""
    photo = Image.open(PHOTO).convert("RGB").resize((1600, 1200))
    photo.save(folder / "photo.jpg", quality=90)
    clip = make_clip(str(folder / "clip.mp4"), height=480, width=854, seconds=10)
    return {
        "text": [QUESTION],
        "image": [{"type": "image", "image": str(folder / "photo.jpg")}, QUESTION],
        "video": [{"type": "video", "video": clip}, QUESTION],
    }


def samples_per_second(samples, num_samples: int) -> float:
    """Consume samples; the first, which starts processes and fills caches, is not counted."""
    samples = iter(samples)
    next(samples)
    start = time.perf_counter()
    for _ in range(num_samples):
        next(samples)
    return num_samples / (time.perf_counter() - start)


def measure(kind: str, question: list[dict], num_samples: int, rounds: int) -> None:
    """Print samples per second of every way for one kind of media; the best round counts."""
    pixels = {name: DEFAULTS[name] for name in ("max_pixels", "video_max_pixels")}
    config, processor, encoder = load_tiny(**pixels)
    normalize = InputBuilder(processor, "sdpa", torch.device("cpu")).normalize
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
    options = {"return_tensors": "pt"}
    if kind == "video":
        options |= {"do_sample_frames": True, "fps": config.video_fps}

    def encode(_=None):
        return encoder.encode({"messages": messages})

    def own_path():
        return processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, processor_kwargs=options
        )

    def load():
        items = [None] * (num_samples + 1)
        return DataLoader(items, batch_size=1, collate_fn=encode, num_workers=2)

    ways = {
        "processor alone (float32 patches)": lambda: iter(own_path, None),
        "ours": lambda: iter(encode, None),
        "ours, normalized on the CPU (float32 patches)": lambda: (
            normalize(sample.patches) for sample in iter(encode, None)
        ),
        "ours, DataLoader, 2 workers": load,
    }
    print_header(f"{kind}: {len(encode().patches)} patches a sample", "samples/s")
    for name, way in ways.items():
        try:
            print_row(name, max(samples_per_second(way(), num_samples) for _ in range(rounds)))
        except (ImportError, RuntimeError, ValueError) as error:
            print_row(name, f"fails: {str(error).splitlines()[0][:60]}")
    print()


def measure_index(kind: str, question: list[dict], folder: Path, num_samples: int) -> None:
    """Print the samples per second of the first pass over a JSONL file of unlike samples."""
    _, _, encoder = load_tiny()
    with (folder / f"{kind}.jsonl").open("w") as file:
        for i in range(num_samples):
            answer = {"role": "assistant", "content": f"A cup of coffee on table {i}. " * (i % 9)}
            messages = [{"role": "user", "content": question}, answer]
            print(json.dumps({"messages": messages}), file=file)
    index_module.CACHE_DIR = folder
    start = time.perf_counter()
    index, problems = index_module.build_index(Records([str(folder / f"{kind}.jsonl")]), encoder)
    assert not problems and len(index) == num_samples
    print_row(kind, num_samples / (time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--num_samples", type=int, default=20, help="samples in a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements; the best counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        questions = make_questions(Path(folder))
        for kind in ("image", "video"):
            measure(kind, questions[kind], arguments.num_samples, arguments.rounds)
        print_header("first pass", "samples/s")
        for kind, question in questions.items():
            measure_index(kind, question, Path(folder), 1000 * arguments.num_samples)


if __name__ == "__main__":
    main()
