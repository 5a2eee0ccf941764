"""The embedded tiny Qwen2-VL: the real classes at a few million parameters, with random weights.

    python -m util.model.tiny DIR

It runs the same code as the 2B model, on a CPU, in about a minute. It knows nothing: what it
answers after training, it learned from the training data alone.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from util.config import logger

REPO_DIR = Path(__file__).resolve().parents[2]
TRAIN_DATA = REPO_DIR / "train_data" / "data.json"
FILES_DIR = Path(__file__).with_suffix("")

# In the order in which Qwen2-VL numbers them, after the vocabulary.
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]

# Renders what Qwen2-VL's own template renders, the default system prompt included.
CHAT_TEMPLATE = (FILES_DIR / "chat_template.jinja").read_text(encoding="utf-8")


def build_tokenizer(texts: list[str], vocab_size: int = 512):
    """Return a Qwen2Tokenizer, its BPE trained on `texts`, with Qwen2-VL's special tokens."""
    bpe = transformers.Qwen2Tokenizer()._tokenizer  # brings Qwen's normalizer and pre-tokenizer
    trainer = BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    # Special tokens are put into the vocabulary here: as added tokens of a finished tokenizer,
    # eos_token and pad_token would take the first free ids, out of Qwen2-VL's order.
    vocab = {token: i for token, i in model["vocab"].items() if token not in SPECIAL_TOKENS}
    vocab = {token: i for i, token in enumerate(sorted(vocab, key=vocab.get))}
    vocab.update({token: len(vocab) + i for i, token in enumerate(SPECIAL_TOKENS)})
    return transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        model_max_length=32768,
        padding_side="left",
    )


def read_settings(name: str, tokenizer) -> dict:
    """Return what a file of FILES_DIR holds; tokens, which it has by name, become their ids."""

    def to_ids(settings: dict) -> dict:
        names = {key: value for key, value in settings.items() if key.endswith("_token_id")}
        return settings | {k: tokenizer.convert_tokens_to_ids(v) for k, v in names.items()}

    return json.loads((FILES_DIR / name).read_text(encoding="utf-8"), object_hook=to_ids)


def build_config(tokenizer):
    """Return the configuration of a Qwen2-VL with 4 million parameters for `tokenizer`."""
    settings = read_settings("config.json", tokenizer)
    settings["text_config"]["vocab_size"] = len(tokenizer)
    return transformers.Qwen2VLConfig(**settings)


def build_tiny_model(output_dir: str | Path) -> None:
    """Write model, processor and chat template of the tiny model to the folder `output_dir`."""
    tokenizer = build_tokenizer(_strings(json.loads(TRAIN_DATA.read_text(encoding="utf-8"))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2VLForConditionalGeneration(build_config(tokenizer))
    # The sampling settings of Qwen2-VL-2B-Instruct, near greedy.
    sampling = read_settings("generation_config.json", tokenizer)
    model.generation_config = transformers.GenerationConfig(**sampling)
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def cached_tiny_model() -> str:
    """Return the folder of the tiny model, built on first use and again when its sources change.

    Or where it is damaged.
    """
    files = [Path(__file__), *sorted(FILES_DIR.iterdir()), TRAIN_DATA]
    sources = b"".join(file.read_bytes() for file in files)
    key = hashlib.sha256(sources + transformers.__version__.encode()).hexdigest()[:12]
    folder = REPO_DIR / ".cache" / f"tiny-{key}"
    checksum = folder / "checksum.txt"
    if folder.is_dir() and not (checksum.is_file() and checksum.read_text() == _checksum(folder)):
        logger.warning(f"{folder} is damaged: the tiny model is built again")
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        # Built beside and renamed: a second process never sees half a model.
        building = tempfile.mkdtemp(dir=folder.parent)
        build_tiny_model(building)
        Path(building, "checksum.txt").write_text(_checksum(Path(building)))
        try:
            os.rename(building, folder)
        except OSError:  # another process was first
            shutil.rmtree(building)
    return str(folder)


def _checksum(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.name != "checksum.txt")
    return hashlib.sha256(
        b"".join(path.name.encode() + path.read_bytes() for path in files)
    ).hexdigest()


def _strings(value) -> list[str]:
    """Return all strings inside a JSON value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m util.model.tiny DIR")
    build_tiny_model(sys.argv[1])
