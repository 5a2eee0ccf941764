"""What fits where: the planner's figures for 2B and 7B, as the table of README.md has them.

    python -m benchmarks.bench_fit

No weights and no GPU are needed. The data: 8 samples, each as long as --max_tokens 4096 allows,
half of it two pictures of 896 x 896 pixels, half text, of which the answer, some 500 tokens, is
supervised; steps of 4 samples, so of 4 micro-batches.
"""

import json
import os
import tempfile
from pathlib import Path

from PIL import Image

from check_data import load_for_plan
from util.config import Config, fill_defaults
from util.data.batch import prepare_data
from util.tools.planner import SAVERS, flags_text, plan_memory

MODELS = ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct")
MAX_TOKENS = 4096


def write_data(folder: Path, encoder) -> str:
    """Write a data file of samples that just fit, and return its path."""
    pictures = [str(folder / f"{i}.png") for i in range(2)]
    for path in pictures:
        Image.new("RGB", (896, 896), "gray").save(path)

    def sample(num_words: int) -> dict:
        content = [{"type": "image", "image": path} for path in pictures]
        content.append({"type": "text", "text": "a " * num_words})
        answer = {"role": "assistant", "content": "a " * 500}
        return {"messages": [{"role": "user", "content": content}, answer]}

    # About one token a word; the sample without words says how many are missing.
    room = MAX_TOKENS - encoder.num_dummy_tokens
    num_words = room - encoder.measure(sample(0))[0]
    while encoder.measure(sample(num_words))[0] > room:
        num_words -= 1
    path = folder / "data.json"
    path.write_text(json.dumps([sample(num_words)] * 8))
    return str(path)


def load_models() -> list:
    """Return (processor, encoder, model configuration) of both models, and nothing to load."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    return [load_for_plan(flags_of(name)) for name in MODELS]


def flags_of(model: str, **flags) -> Config:
    """Return the flags of a run on a GPU."""
    flags = {"model_name_or_path": model, "batch_size": 4, "max_tokens": MAX_TOKENS} | flags
    return fill_defaults(Config(**flags), "cuda")


def table_row(loaded: list, data_file: str, changes: dict) -> str:
    """Return a row of the table: GiB of the states and at the peak, for each model."""
    cells = [f"`{flags_text(changes)}`" if changes else "none (`--precision bf16`)"]
    for name, (processor, encoder, model_config) in zip(MODELS, loaded):
        config = flags_of(name, train_data=[data_file], **changes)
        data = prepare_data([data_file], encoder, config, world_size=1)
        needed = plan_memory(model_config, processor, config, data, shard_size=1)
        states = sum(needed[kind] for kind in ("weights_gib", "gradients_gib", "optimizer_gib"))
        cells += [f"{states:.1f}", f"{needed['peak_gib']:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    loaded = load_models()
    with tempfile.TemporaryDirectory() as folder:
        path = write_data(Path(folder), loaded[0][1])
        print("| flags | 2B: states | 2B: peak | 7B: states | 7B: peak |\n|---|---|---|---|---|")
        for changes in ({}, *SAVERS):
            print(table_row(loaded, path, changes), flush=True)


if __name__ == "__main__":
    main()
