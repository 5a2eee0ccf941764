"""What the tests share: the tiny model, the real tokenizer, and data that they make themselves."""

import functools
import json
import multiprocessing
import signal
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from util.config import Config, fill_defaults
from util.data.batch import prepare_data
from util.model.inputs import InputBuilder
from util.model.load import build_encoder, load_model, load_processor
from util.model.tiny import CHAT_TEMPLATE, cached_tiny_model

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
# Two test processes share two cores.
torch.set_num_threads(1)


def pytest_sessionfinish():
    """End the loader's workers of runs that have failed: Python would wait for them."""
    for worker in multiprocessing.active_children():
        worker.kill()


@pytest.fixture(autouse=True)
def signal_handlers():
    """Take back the handlers that a training in this process leaves behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_folder() -> str:
    return cached_tiny_model()


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
    (folder / "config.json").write_text((Path(tiny_folder) / "config.json").read_text())
    return str(folder)


def tiny_config(**flags) -> Config:
    """Return the configuration of a CPU run on tiny."""
    return fill_defaults(Config(model_name_or_path="tiny", **flags), "cpu")


@functools.cache
def encoder_for(folder: str, **flags):
    """Return the encoder that training would use for a model folder."""
    config = tiny_config(**flags)
    return build_encoder(folder, load_processor(folder, config), config)


def set_up(config: Config, folder: str) -> SimpleNamespace:
    """Prepare a run as finetune.main() does, without an output folder."""
    processor = load_processor(folder, config)
    encoder = build_encoder(folder, processor, config)
    data = prepare_data(config.train_data, encoder, config, world_size=1)
    return SimpleNamespace(
        config=config,
        model=load_model(folder, "packed_sdpa", CPU, config),
        processor=processor,
        build_inputs=InputBuilder(processor, "packed_sdpa", CPU),
        data=data,
        plan=data.plan,
        encoder=encoder,
        records=data.samples.records,
        index=data.index,
    )


def plain_model(folder: str):
    """Load a model with stock attention, as anyone would."""
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


# ------------------------------------------------------------------ data that tests make


def make_image(path: Path, height: int, width: int, seed: int = 0) -> str:
    """Write a smooth random PNG."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


def make_video(path: Path, num_frames: int, height: int, width: int, fps: int = 4) -> str:
    """Write an H.264 clip whose frames get brighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            pixels = np.full((height, width, 3), 255 * i // max(1, num_frames - 1), np.uint8)
            pixels[: height // 2, : width // 2] = (200, 30, i % 256)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def user(*content) -> dict:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else [*content]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(path: str) -> dict:
    return {"type": "image", "image": path}


def video(path: str) -> dict:
    return {"type": "video", "video": path}


def write_data(path: Path, conversations: list[list[dict]]) -> str:
    """Write conversations as a data file."""
    records = [{"messages": messages} for messages in conversations]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory) -> str:
    """25 samples: text, one and several images, videos, several turns; lengths spread widely."""
    folder = tmp_path_factory.mktemp("mixed")
    images = [
        make_image(folder / f"{i}.png", 60 + 40 * (i % 4), 60 + 30 * (i % 5), i) for i in range(8)
    ]
    clips = [
        make_video(folder / f"{i}.mp4", 8 + 4 * i, 64 + 32 * (i % 2), 96, fps=4) for i in range(3)
    ]
    conversations = []
    for i in range(25):
        question = text(f"Question {i}? " + "What do you see? " * (i % 5))
        answer = assistant(f"Answer {i}: " + "so it is, " * (i % 7) + "\n\n" * (i % 2))
        kind = i % 5
        if kind == 0:
            conversations.append([user(question["text"]), answer])
        elif kind in (1, 2):
            conversations.append([user(image(images[i % 8]), question), answer])
        elif kind == 3:
            many = [image(images[(i + k) % 8]) for k in range(3)]
            conversations.append(
                [user(*many, question), answer, user("And then?"), assistant("然后没有了。")]
            )
        else:
            conversations.append([user(video(clips[i % 3]), question), answer])
    return write_data(folder / "data.json", conversations)
