"""What tests share and is no fixture: runs on tiny, scripts, measures, and data made by hand."""

import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText

from util.checkpoint import damage, list_checkpoints
from util.config import Config, fill_defaults
from util.data.batch import prepare_data
from util.model.inputs import InputBuilder
from util.model.load import build_encoder, load_model, load_processor
from util.vision_util import PixelPolicy
from zygote import READ_BY_FORKS, Python

REPO = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
POLICY = PixelPolicy(
    min_pixels=4 * 28 * 28,
    max_pixels=64 * 28 * 28,
    video_fps=2.0,
    video_max_frames=768,
    video_max_pixels=768 * 28 * 28,
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
)
# What takes longer hangs: a busy machine is no fault of ours.
HANG_SECONDS = 1800
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def start(*command, cwd=REPO, streams=None, **environment) -> subprocess.Popen:
    """Start a command in a process group of its own."""
    command = [str(part) for part in command]
    if command[0].endswith(".py"):
        command.insert(0, sys.executable)
    # An environment of its own may be read while modules are imported.
    is_forked = command[0] == sys.executable and environment.keys() <= READ_BY_FORKS
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return (Python if is_forked else subprocess.Popen)(
        command,
        cwd=cwd,
        env=ENVIRONMENT | environment,
        text=True,
        start_new_session=True,
        **pipes | (streams or {}),
    )


def run_script(*command, code=0, **options) -> str:
    """Run a command and return what it printed, both streams."""
    return finish(start(*command, **options), None, code)


def free_port() -> str:
    """Return a port on which this machine's launchers can find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def finish(process, timeout=HANG_SECONDS, code=0) -> str:
    """Wait for a process, end it where that takes too long, and return what it printed."""
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its ranks
        printed, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s:\n{printed}")
    assert process.returncode == code, printed
    return printed


def wait_for(condition, process, seconds=HANG_SECONDS) -> None:
    """Wait until `condition` holds; the process must not have ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def call(script, *flags) -> None:
    """Run main() of a script with flags, in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        script.main()


def tiny_config(**flags) -> Config:
    """Return the configuration of a CPU run on tiny."""
    return fill_defaults(Config(model_name_or_path="tiny", **flags), "cpu")


@functools.cache
def processor_for(folder: str):
    return load_processor(folder, tiny_config())


@functools.cache
def encoder_for(folder: str, **flags):
    """Return the encoder that training would use for a model folder."""
    return build_encoder(folder, processor_for(folder), tiny_config(**flags))


def set_up(config: Config, folder: str) -> SimpleNamespace:
    """Prepare a run as finetune.main() does, without an output folder."""
    processor = load_processor(folder, config)
    encoder = build_encoder(folder, processor, config)
    data = prepare_data(config.train_data, encoder, config)
    return SimpleNamespace(
        config=config,
        model=load_model(folder, CPU, config),
        processor=processor,
        build_inputs=InputBuilder(processor, "packed_sdpa", CPU),
        data=data,
        plan=data.plan,
        encoder=encoder,
        records=data.samples.records,
        index=data.index,
    )


def autocast(device: torch.device, precision: str):
    """Return the context of a forward pass, as finetune.py has it."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


def plain_model(folder: str):
    """Load a model with stock attention, as anyone would."""
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


# ------------------------------------------------------------------ training and measuring


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def allocator_peak(function, model) -> int:
    """Return the bytes that PyTorch's allocator had handed out at most on the CPU in a call.

    The weights of `model` count.
    """
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = peak = sum(storage.nbytes() for storage in storages.values())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def psnr(a, b) -> float:
    mean_square = np.mean((np.float64(a) - np.float64(b)) ** 2)
    return float(10 * np.log10(255**2 / max(mean_square, 1e-9)))


def hwc(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def read_metrics(output_dir) -> list[dict]:
    """Return the rows of the metrics.jsonl of a run."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def undamaged_steps(output_dir) -> list[int]:
    """Return the steps of a run's checkpoints, newest first; none of them is damaged."""
    checkpoints = list_checkpoints(Path(output_dir))
    assert not any(map(damage, checkpoints))
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints]


def shown(page) -> list[str]:
    """Return the titles of what a page in a browser shows."""
    return [h2.text_content() for h2 in page.locator("article:visible h2").all()]


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


def mixed_conversations(folder: Path, numbers) -> list[list[dict]]:
    """Return text, one and several images, videos, several turns; lengths spread widely."""
    images = [
        make_image(folder / f"{i}.png", 60 + 40 * (i % 4), 60 + 30 * (i % 5), i) for i in range(8)
    ]
    clips = [
        make_video(folder / f"{i}.mp4", 8 + 4 * i, 64 + 32 * (i % 2), 96, fps=4) for i in range(3)
    ]
    conversations = []
    for i in numbers:
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
    return conversations
