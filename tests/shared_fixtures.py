"""Fixtures that tests share: the tiny model, the real tokenizer, and data; see helpers.py too."""

import util  # isort: skip # noqa: F401 (before torch)

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from families import build_small
from helpers import mixed_conversations, write_data
from util.model.tiny import CHAT_TEMPLATE, build_config, cached_tiny_model

# Test processes share two cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder() -> str:
    return cached_tiny_model()


@pytest.fixture(scope="session")
def small_folder(tiny_folder, tmp_path_factory) -> str:
    """A Qwen2-VL of 0.6 million parameters, for what needs many steps."""
    return build_small(tiny_folder, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def real_tokenizer():
    """The tokenizer of Qwen2-VL: its true ids, from the ranks in the qwen-agent wheel."""
    import importlib.util

    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from util.model.tiny import SPECIAL_TOKENS

    spec = importlib.util.find_spec("qwen_agent")
    ranks = Path(spec.submodule_search_locations[0]) / "utils" / "qwen.tiktoken"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bpe = TikTokenConverter(vocab_file=str(ranks), pattern=pattern)
    vocab, merges = bpe.extract_vocab_merges_from_model(str(ranks))
    vocab = dict(vocab)
    vocab.update({token: 151643 + i for i, token in enumerate(SPECIAL_TOKENS)})
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
    )


@pytest.fixture(scope="session")
def real_folder(real_tokenizer, tiny_folder, tmp_path_factory):
    """The tiny model's configuration with the real tokenizer: a folder without weights."""
    folder = tmp_path_factory.mktemp("real")
    processor = AutoProcessor.from_pretrained(tiny_folder)
    type(processor)(
        image_processor=processor.image_processor,
        tokenizer=real_tokenizer,
        video_processor=processor.video_processor,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    build_config(real_tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory) -> str:
    """25 samples of all kinds."""
    folder = tmp_path_factory.mktemp("mixed")
    return write_data(folder / "data.json", mixed_conversations(folder, range(25)))


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")
