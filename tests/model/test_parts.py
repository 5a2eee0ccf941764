"""What saves memory: each saver against plain training."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F

import finetune
import helpers
import util.model.loss
from helpers import CPU, call, mixed_conversations, plain_model, read_metrics, set_up, tiny_config
from util.config import UserError
from util.model.families import part_of
from util.model.load import load_model_to_answer
from util.model.loss import cross_entropy_sum
from util.optim import build_optimizer, set_learning_rate
from util.tools.merge_adapter import merge_adapter


def one_micro_batch(run):
    samples = [run.data.samples[i] for i in run.plan.step(0).samples]
    return run.data.samples.collate(samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 12])
def test_the_chunked_loss_is_cross_entropy(monkeypatch, dtype, num_rows):
    monkeypatch.setattr(util.model.loss, "CHUNK_ELEMENTS", 5 * 100)  # 5 rows a chunk
    torch.manual_seed(0)
    values = (4 * torch.randn(1, num_rows, 100)).to(dtype)
    targets = torch.randint(0, 100, (num_rows,))
    theirs = values.clone().requires_grad_()
    loss = F.cross_entropy(theirs[0].float(), targets, reduction="sum")
    (loss / 3).backward()
    ours = values.clone().requires_grad_()
    # As a model's output is: overwritten, so not a leaf.
    loss_in_chunks = cross_entropy_sum(ours * 1, targets)
    (loss_in_chunks / 3).backward()
    assert loss_in_chunks.dtype == torch.float32
    assert loss_in_chunks.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def saved_bytes(run, module=None) -> int:
    """Return the bytes that autograd keeps of `module`'s forward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    storages, within = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if within and storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    module = module or run.model
    module.register_forward_pre_hook(lambda *_: within.append(True))
    module.register_forward_hook(lambda *_: within.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.model.train()(**run.build_inputs(one_micro_batch(run)))
    return sum(num_bytes for _, num_bytes in storages.values())


def test_checkpointed_layers_keep_less(mixed_data, tiny_folder):
    kept = {}
    for layers in ("none", "llm", "vision", "all"):
        config = tiny_config(train_data=[mixed_data], gradient_checkpointing=layers)
        kept[layers] = saved_bytes(set_up(config, tiny_folder))
    assert kept["all"] < min(kept["llm"], kept["vision"]) < kept["none"] / 1.3
    assert kept["all"] < kept["none"] / 4


def longest_moves(run) -> dict[str, float]:
    """Take one optimizer step at a learning rate of 1e-3; return how far each parameter moves."""
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    optimizer = build_optimizer(run.model, run.config)
    set_learning_rate(optimizer, 0, 1, tiny_config(learning_rate=1e-3))
    micro_batch = one_micro_batch(run)
    logits = run.model(**run.build_inputs(micro_batch)).logits
    cross_entropy_sum(logits, micro_batch.targets).backward()
    optimizer.step()
    after = run.model.named_parameters()
    return {name: (p.detach() - before[name]).abs().max().item() for name, p in after}


@pytest.mark.parametrize("parts", [["llm"], ["vision"], ["merger"], ["llm", "merger"]])
def test_frozen_parts_do_not_move_by_one_bit(mixed_data, tiny_folder, parts):
    flags = {"learning_rate": 1e-3, "train": parts}
    run = set_up(tiny_config(train_data=[mixed_data], **flags), tiny_folder)
    for name, move in longest_moves(run).items():
        assert (move > 0) == (part_of(name) in parts), name


def test_the_vision_learning_rate_is_that_of_tower_and_merger(mixed_data, tiny_folder):
    flags = {"learning_rate": 1e-3, "vision_learning_rate": 1e-4, "weight_decay": 0.0}
    run = set_up(tiny_config(train_data=[mixed_data], **flags), tiny_folder)
    for name, move in longest_moves(run).items():
        # AdamW's first step is as long as the learning rate, whatever the gradient.
        assert move == pytest.approx(1e-3 if part_of(name) == "llm" else 1e-4, rel=0.02), name


def test_a_frozen_vision_tower_keeps_no_graph(mixed_data, tiny_folder):
    kept = {}
    for part in ("all", "llm"):
        run = set_up(tiny_config(train_data=[mixed_data], train=[part]), tiny_folder)
        kept[part] = saved_bytes(run, run.model.model.visual)
    assert kept["llm"] == 0
    assert kept["all"] > 2**20


def test_frozen_bf16_weights_give_the_logits_of_frozen_fp32_ones(mixed_data, tiny_folder, tmp_path):
    config = tiny_config(train_data=[mixed_data], train=["merger"], precision="bf16")
    run = set_up(config, tiny_folder)
    dtypes = {name: p.dtype for name, p in run.model.named_parameters()}
    assert dtypes["model.visual.merger.mlp.0.weight"] == torch.float32
    assert dtypes["model.language_model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    micro_batch = one_micro_batch(run)
    with torch.autocast("cpu", torch.bfloat16):
        halved = run.model(**run.build_inputs(micro_batch)).logits
        run.model.float()
        whole = run.model(**run.build_inputs(micro_batch)).logits
    assert torch.equal(halved, whole)


def test_lora_trains_an_adapter_that_loads_and_merges(mixed_data, tiny_folder, tmp_path):
    out, merged = tmp_path / "out", tmp_path / "merged"
    flags = ("--model_name_or_path", "tiny", "--device", "cpu", "--train_data", mixed_data)
    flags = (*flags, "--lora_rank", 4, "--num_workers", 0, "--learning_rate", 1e-2)
    flags = (*flags, "--output_dir", out, "--max_steps", 4)
    call(finetune, *flags)
    metrics = read_metrics(out)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) < 2**20
    assert "q_proj" in json.loads((out / "adapter_config.json").read_text())["target_modules"]

    merge_adapter(str(out), str(merged))
    with pytest.raises(UserError, match="is not an empty folder"):
        merge_adapter(str(out), str(merged))
    models = {
        "adapter": load_model_to_answer(str(out), "sdpa", CPU, torch.float32),
        "merged": load_model_to_answer(str(merged), "sdpa", CPU, torch.float32),
        "as anyone would": plain_model(str(out)),
        "base": plain_model(tiny_folder),
    }
    run = set_up(tiny_config(train_data=[mixed_data]), tiny_folder)
    inputs = run.build_inputs(run.data.samples.collate([run.data.samples[1]]))
    with torch.no_grad():
        logits = {name: model(**inputs).logits for name, model in models.items()}
    differences = {name: (logits["adapter"] - logits[name]).abs().max() for name in logits}
    assert differences["merged"] < 1e-4 and differences["as anyone would"] < 1e-4
    assert differences["base"] > 1e-2


@pytest.fixture(scope="module")
def held_out_loss(tmp_path_factory):
    """Return a function: a precision, and flags -> the held-out loss after 200 steps, 4 epochs.

    At a learning rate at which the loss falls evenly: where it falls in leaps, or after many rounds
    over a few samples, any rounding ends elsewhere.
    """
    folder = tmp_path_factory.mktemp("data")
    train_data, held_out = (
        helpers.write_data(folder / f"{last}.json", mixed_conversations(folder, range(first, last)))
        for first, last in ((0, 400), (400, 480))
    )

    @functools.cache
    def loss(precision: str, *more_flags) -> float:
        out = tmp_path_factory.mktemp(precision) / "out"
        flags = ("--model_name_or_path", "tiny", "--device", "cpu", "--precision", precision)
        flags = (*flags, "--train_data", train_data, "--video_fps", 1, "--batch_size", 8)
        flags = (*flags, "--eval_data", held_out, "--learning_rate", 1e-4)
        call(finetune, *flags, "--num_epochs", 4, "--output_dir", out, *more_flags)
        last = read_metrics(out)[-1]
        assert last["global_step"] == 200
        return last["eval_loss"]

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16_lean"])
def test_200_steps_end_near_those_of_fp32(held_out_loss, precision):
    assert held_out_loss(precision) == pytest.approx(held_out_loss("fp32"), rel=0.01)


@pytest.mark.slow
def test_200_steps_on_4_bits_end_near_those_on_16(held_out_loss):
    lora = ("--lora_rank", 8, "--learning_rate", 1e-3)
    rounded, whole = (held_out_loss(precision, *lora) for precision in ("bf16_4bit", "bf16"))
    assert rounded == pytest.approx(whole, rel=0.03)
