"""Device, attention and where a model comes from."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from helpers import CPU, assistant, tiny_config, user
from util import run
from util.config import UserError
from util.data import sample
from util.data.sample import IGNORE
from util.model import attention, load, tiny
from util.model.attention import choose_attention
from util.run import choose_device

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "device, precision, installed, capability, expected",
    [
        (CUDA, "bf16", True, (8, 0), "flash_attention_2"),
        (CUDA, "bf16", True, (9, 0), "flash_attention_2"),
        (CUDA, "bf16", False, (8, 0), "packed_varlen"),
        (CUDA, "bf16_lean", False, (12, 0), "packed_varlen"),
        (CUDA, "bf16", True, (7, 5), "packed_sdpa"),
        (CUDA, "fp32", True, (7, 5), "packed_sdpa"),
        (CUDA, "fp32", True, (9, 0), "packed_sdpa"),
        (CPU, "bf16", True, (9, 0), "packed_sdpa"),
    ],
)
def test_choice_of_attention(
    monkeypatch, caplog, device, precision, installed, capability, expected
):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_attention(device, precision) == expected
    if capability == (7, 5) and precision == "bf16":  # it is told what bf16 costs there
        assert "7.5" in caplog.text and "--precision fp32" in caplog.text
    else:
        assert not caplog.messages


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
        load.find_model("Qwen/Qwen2-VL-2B-Instruct")
    assert time.perf_counter() - started < 15
    for way_out in ("hf download", "HF_ENDPOINT", "modelscope", "tiny", "http://127.0.0.1:9"):
        assert way_out in str(info.value)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        load.find_model(str(tmp_path))
    for name in ("./nowhere", "/no/where", "nowhere", "models/Qwen2 VL", "my:model/a?x", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            load.find_model(name)


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
        load.load_processor(str(folder), tiny_config())
        load.load_model(str(folder), CPU, tiny_config())


@pytest.mark.parametrize("fault", ["no tokenizer", "added token", "endless", "broken", "rank"])
def test_folders_that_do_not_fit_together_are_named(tiny_folder, tmp_path, monkeypatch, fault):
    folder, template = tmp_path / "model", "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    shutil.copytree(tiny_folder, folder)
    monkeypatch.setattr(sample, "RENDER_SECONDS", 0.2)
    if fault == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        words = "its tokenizer does not know <|image_pad|>"
    elif fault == "added token":
        tokenizer = load.load_processor(tiny_folder, tiny_config()).tokenizer
        tokenizer.add_tokens(["<defect>"])
        tokenizer.save_pretrained(folder)
        words = "'<defect>' as token .*resize_token_embeddings"
    elif fault == "rank":
        settings = LoraConfig(r=1_000_000, base_model_name_or_path=tiny_folder)
        settings.save_pretrained(folder)
        save_file({"a.lora_A.weight": torch.zeros(8, 2)}, folder / "adapter_model.safetensors")
        words = r"rank \{1000000\}, the weights have \{8\}"
    else:
        (folder / "chat_template.jinja").write_text(template[: None if fault == "endless" else 50])
        words = "chat template" + (" of .* does not end" if fault == "endless" else " fails")
    with pytest.raises(UserError, match=words):
        processor = load.load_processor(str(folder), tiny_config())
        load.build_encoder(str(folder), processor, tiny_config())
        load.check_adapter(folder)


def test_a_damaged_tiny_model_is_built_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tiny, "REPO_DIR", tmp_path)
    weights = Path(tiny.cached_tiny_model()) / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:-1] + b"\7"):
        weights.write_bytes(damaged)
        tiny.cached_tiny_model()
        assert weights.read_bytes() == content and "is damaged" in caplog.text
        caplog.clear()
    tiny.cached_tiny_model()
    assert not caplog.text


def test_lora_tells_that_added_tokens_stay_as_they_are(tiny_folder, tmp_path, caplog):
    """Also one that looks like Qwen's own; of these there is no warning, nor without LoRA."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = load.load_processor(tiny_folder, tiny_config()).tokenizer
    own = ["<tts_pad>", "<tts_text_bos_single>", "<|audio_start|>", "<|audio_pad|>"]
    tokenizer.add_tokens([*own, "<defect>", "<|im_happy|>", "<tool_call>"])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] += 7
    (folder / "config.json").write_text(json.dumps(config))
    for model, rank in ((str(folder), 8), (str(folder), None), (tiny_folder, 8)):
        *_, encoder = load.load_encoder(
            replace(tiny_config(lora_rank=rank), model_name_or_path=model)
        )
        told = [record.message for record in caplog.records]
        assert bool(told) == (model == str(folder) and rank == 8)
        assert not told or "of 2 added tokens too, <defect>, <|im_happy|>." in told[0]
        caplog.clear()
    encoder = load.load_encoder(replace(tiny_config(), model_name_or_path=str(folder)))[2]
    answer = "A <defect> and <|im_happy|>."
    record = {"messages": [user("Hi"), assistant(answer)]}
    sample = encoder.encode(record)
    labels = sample.labels[sample.labels != IGNORE].tolist()
    assert encoder.decode_answer(labels) == answer
    assert labels.count(len(tokenizer) - 3) == labels.count(len(tokenizer) - 2) == 1
