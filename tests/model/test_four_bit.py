"""LoRA on a base in 4 bits: the layer, the run, the adapter, and what is told."""

import importlib.util
import json
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file

import finetune
import helpers
import test_on_trained_model_by_us as asking
from helpers import CPU, assistant, call, image, make_image, text, user, write_data
from util.config import BITSANDBYTES, UserError, parse_config
from util.model import four_bit
from util.model.four_bit import FourBitLinear, quantize
from util.model.load import load_model_to_answer
from util.model.parts import prepare_for_training
from util.tools import merge_adapter
from util.tools.planner import count_states

FLAGS = ("--model_name_or_path", "tiny", "--device", "cpu", "--precision", "bf16_4bit")
FLAGS += ("--lora_rank", "32", "--num_workers", "0")


@pytest.mark.parametrize("shape", [(704, 256), (60, 130)])  # blocks lie in two rows of the latter
def test_a_layer_computes_with_the_weight_that_it_is_rounded_to(shape):
    torch.manual_seed(0)
    linear = torch.nn.Linear(*shape[::-1])
    layer = FourBitLinear(linear)
    assert sum(p.nbytes for p in layer.parameters()) < 0.52 * linear.weight.numel() + 2**12
    on_meta = quantize(linear.weight.to("meta"))
    assert {name: p.shape for name, p in layer.named_parameters() if name != "bias"} == {
        name: p.shape for name, p in on_meta.items()
    }
    packed, state = quantize_4bit(linear.weight.data, compress_statistics=True, quant_type="nf4")
    rounded = dequantize_4bit(packed, state)
    assert 0 < (rounded - linear.weight).norm() < 0.1 * linear.weight.norm()
    inputs = torch.randn(3, 5, shape[1], requires_grad=True)
    for is_autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            outputs = layer(inputs), F.linear(inputs, rounded, linear.bias)
        assert outputs[0].dtype == outputs[1].dtype
        toward = torch.randn_like(outputs[0])
        gradients = (torch.autograd.grad(output, inputs, toward)[0] for output in outputs)
        for ours, theirs in (outputs, gradients):
            torch.testing.assert_close(ours, theirs)


def test_a_base_is_rounded_layer_by_layer(tiny_folder, monkeypatch):
    """The weights of one are gone before the next: two copies of a model are never held."""
    model, config = (
        helpers.plain_model(tiny_folder),
        helpers.tiny_config(precision="bf16_4bit", lora_rank=4),
    )
    layers = model.model.language_model.modules()
    weights = [weakref.ref(m.weight) for m in layers if isinstance(m, torch.nn.Linear)]
    num_held = []

    def count_and_quantize(weight):
        num_held.append(sum(weight() is not None for weight in weights))
        return quantize(weight)

    monkeypatch.setattr(four_bit, "quantize", count_and_quantize)
    prepare_for_training(model, config, CPU)
    assert num_held == [*range(len(weights), 0, -1)]
    planned = count_states(model.config, config).weights
    assert sum(p.nbytes for p in model.parameters()) == planned


@pytest.fixture(scope="module")
def lessons(tmp_path_factory) -> str:
    """Three pictures, and what is to be said of each."""
    folder = tmp_path_factory.mktemp("lessons")
    pictures = (make_image(folder / f"{i}.png", 56, 56, i) for i in range(3))
    answers = ("A red barn.", "两只猫。", "Nothing at all")
    conversations = [
        [user(image(p), text("What?")), assistant(a)] for p, a in zip(pictures, answers)
    ]
    return write_data(folder / "data.json", conversations)


@pytest.fixture(scope="module")
def trained(lessons, tmp_path_factory):
    """The folder of a run that has learned its lessons by heart."""
    out = tmp_path_factory.mktemp("trained") / "out"
    call(finetune, *FLAGS, *run_flags(lessons, out))
    return out


def run_flags(lessons, out) -> tuple:
    flags = ("--train_data", lessons, "--batch_size", 3, "--max_steps", 60, "--save_steps", 30)
    return *flags, "--learning_rate", 3e-3, "--output_dir", out


def answers_of(folder, lessons, tmp_path) -> list[str]:
    flags = ("--model_dir", folder, "--prompts", lessons, "--save", tmp_path / "answers.json")
    call(asking, *flags, "--device", "cpu", "--max_new_tokens", 16)
    return json.loads((tmp_path / "answers.json").read_text())["answers"]


def test_the_adapter_answers_alike_before_and_after_the_merge(trained, lessons, tmp_path, capsys):
    merged = tmp_path / "merged"
    call(merge_adapter, trained, merged)
    assert "base rounded to 4 bits" in capsys.readouterr().out
    for folder in (trained, trained / "checkpoint-60", merged):
        for row in answers_of(folder, lessons, tmp_path):
            assert row["answer"] == row["reference"], folder
    layers = [
        load_model_to_answer(str(folder), "sdpa", CPU, torch.float32).model.language_model.layers[0]
        for folder in (trained, merged)
    ]
    assert isinstance(layers[0].mlp.up_proj.base_layer, FourBitLinear)
    assert type(layers[1].mlp.up_proj) is torch.nn.Linear


def test_the_adapter_is_that_of_any_base(trained, lessons, tmp_path):
    """Its files are those of a run in bf16, but for their values."""
    flags = ("--train_data", lessons, "--max_steps", 1, "--output_dir", tmp_path / "bf16")
    call(finetune, *FLAGS, *flags, "--precision", "bf16")
    settings, adapters = (
        [load(folder / name) for folder in (trained, tmp_path / "bf16")]
        for name, load in (
            ("adapter_config.json", lambda path: json.loads(path.read_text())),
            ("adapter_model.safetensors", load_file),
        )
    )
    assert settings[0] == settings[1]
    shapes = [{n: (t.dtype, t.shape) for n, t in tensors.items()} for tensors in adapters]
    assert shapes[0] == shapes[1]


def test_a_resumed_run_ends_with_the_same_adapter(trained, lessons, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    call(finetune, *FLAGS, *run_flags(lessons, copy), "--resume_from", copy / "checkpoint-30")
    ours, theirs = ((path / "adapter_model.safetensors").read_bytes() for path in (copy, trained))
    assert ours == theirs


def test_what_is_missing_is_told(monkeypatch):
    with pytest.raises(UserError, match="needs --lora_rank"):
        parse_config(["--precision", "bf16_4bit"])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else find_spec(name),
    )
    with pytest.raises(UserError, match=f"pip install {BITSANDBYTES}"):
        parse_config(list(FLAGS))
    assert BITSANDBYTES in (helpers.REPO / "requirements-dev.txt").read_text().splitlines()
