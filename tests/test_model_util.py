"""Device, attention and where a model comes from."""

import time

import pytest
import torch
from conftest import CPU

from util import model_util
from util.config import UserError
from util.model_util import choose_attention, choose_device, find_model

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
    monkeypatch.setattr(model_util, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_attention(device, precision) == expected


def test_choice_of_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == CUDA
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == CPU


def test_an_nvidia_device_that_cannot_be_used_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(model_util.Path, "exists", lambda self: str(self) == "/dev/nvidia0")
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
    monkeypatch.setattr(model_util.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(model_util.constants, "HF_HUB_OFFLINE", False)
    started = time.perf_counter()
    with pytest.raises(UserError) as info:
        find_model("Qwen/Qwen2-VL-2B-Instruct")
    assert time.perf_counter() - started < 15
    for way_out in ("hf download", "HF_ENDPOINT", "modelscope", "tiny", "http://127.0.0.1:9"):
        assert way_out in str(info.value)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        find_model(str(tmp_path))
    for name in ("./nowhere", "/no/where", "nowhere"):
        with pytest.raises(UserError, match="no such folder"):
            find_model(name)
