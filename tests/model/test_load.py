"""Device, attention and where a model comes from."""

import shutil
import time

import pytest
import torch

from helpers import CPU, tiny_config
from util import run
from util.config import UserError
from util.model import attention, load
from util.model.attention import choose_attention
from util.model.load import find_model, load_model, load_processor
from util.run import choose_device

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "device, precision, installed, capability, expected",
    [
        (CUDA, "bf16", True, (8, 0), "flash_attention_2"),
        (CUDA, "bf16", True, (9, 0), "flash_attention_2"),
        (CUDA, "bf16", False, (9, 0), "packed_sdpa"),
        (CUDA, "bf16", True, (7, 5), "packed_sdpa"),
        (CUDA, "fp32", True, (9, 0), "packed_sdpa"),
        (CPU, "bf16", True, (9, 0), "packed_sdpa"),
    ],
)
def test_choice_of_attention(monkeypatch, device, precision, installed, capability, expected):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_attention(device, precision) == expected


def test_choice_of_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(None) == CUDA
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == CPU
    for name in ("gpu", "cuda0", "cuda:x", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: must be"):
            choose_device(name)
    with pytest.raises(UserError, match="--device cuda:9: torch finds 2 GPUs"):
        choose_device("cuda:9")


def test_an_nvidia_device_that_cannot_be_used_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run.Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="NVIDIA device.*driver"):
        choose_device(None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="without CUDA.*requirements.txt"):
        choose_device(None)
    with pytest.raises(UserError, match="--device cuda"):
        choose_device("cuda")
    assert choose_device("cpu") == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert choose_device(None) == CPU


def test_unreachable_hub_is_found_in_seconds_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(load.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(load.constants, "HF_HUB_OFFLINE", False)
    started = time.perf_counter()
    with pytest.raises(UserError) as info:
        find_model("Qwen/Qwen2-VL-2B-Instruct")
    assert time.perf_counter() - started < 15
    for way_out in ("hf download", "HF_ENDPOINT", "modelscope", "tiny", "http://127.0.0.1:9"):
        assert way_out in str(info.value)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        find_model(str(tmp_path))
    for name in ("./nowhere", "/no/where", "nowhere", "models/Qwen2 VL", "my:model/a?x", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            find_model(name)


@pytest.mark.parametrize("fault", ["config.json", "no processor", "no weights", "cut weights"])
def test_folders_that_are_not_whole_are_named(tiny_folder, tmp_path, fault):
    """As a download that was interrupted leaves them."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    if fault == "config.json":
        (folder / fault).write_bytes((folder / fault).read_bytes()[:100])
    elif fault == "no processor":
        for path in [p for p in folder.iterdir() if p.name != "config.json"]:
            path.unlink()
    elif fault == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{folder}: cannot be loaded; are all files there\\?"):
        load_processor(str(folder), tiny_config())
        load_model(str(folder), CPU, tiny_config())
