"""Memory and machine settings never change the mathematics."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, plain_model, set_up, tiny_config
from test_packing import alone_inputs

from finetune import train
from util.data.sample import IGNORE
from util.optim import build_optimizer, learning_rate_at

FLAGS = {"batch_size": 8, "num_epochs": 2, "learning_rate": 1e-3, "precision": "fp32"}


def train_packed(mixed_data, folder, output_dir, **flags):
    """Run train() and return its metrics and the final weights as one vector."""
    flags = FLAGS | flags | {"train_data": [mixed_data], "output_dir": str(output_dir)}
    run = set_up(tiny_config(**flags), folder)
    num_steps = run.plan.num_steps_per_epoch * run.config.num_epochs
    torch.manual_seed(0)
    train(run.config, run.model, run.processor, run.data, None, num_steps, CPU)
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], weights(run.model)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train_plainly(mixed_data, folder):
    """Train with each sample by itself, nothing packed, and the gradients summed up."""
    run = set_up(tiny_config(train_data=[mixed_data], **FLAGS), folder)
    model = plain_model(folder).train()
    config, plan = run.config, run.plan
    optimizer = build_optimizer(model, config)
    num_steps = plan.num_steps_per_epoch * config.num_epochs
    metrics = []
    for i in range(num_steps):
        samples = [run.encoder.encode(run.records[k]) for k in plan.step(i).samples]
        count = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
        total = 0.0
        for sample in samples:
            logits = model(**alone_inputs(run, sample)).logits[0, :-1]
            loss = F.cross_entropy(logits, sample.labels[1:], reduction="sum", ignore_index=IGNORE)
            (loss / count).backward()
            total += loss.item() / count
        # A step without a picture still decays the weights of the vision tower.
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        lr = learning_rate_at(i, num_steps, config.learning_rate, config.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        metrics.append({"loss": total, "grad_norm": norm.item(), "num_samples": len(samples)})
    return metrics, weights(model)


@pytest.fixture(scope="module")
def plain(mixed_data, tiny_folder):
    return train_plainly(mixed_data, tiny_folder)


@pytest.mark.parametrize(
    "flags",
    [
        {"max_tokens": 100_000, "num_workers": 0},  # a step is one micro-batch
        {"max_tokens": 300, "num_workers": 2},  # several samples in each
        {"max_tokens": "longest", "num_workers": 0},  # about one sample in each
    ],
    ids=["whole_step", "packed_by_workers", "one_by_one"],
)
def test_packing_and_workers_do_not_change_the_run(flags, plain, mixed_data, tiny_folder, tmp_path):
    run = set_up(tiny_config(train_data=[mixed_data]), tiny_folder)
    if flags["max_tokens"] == "longest":
        flags = flags | {"max_tokens": int(run.index.num_tokens.max()) + 1}
    metrics, final = train_packed(mixed_data, tiny_folder, tmp_path, **flags)
    expected, expected_final = plain
    assert [m["num_samples"] for m in metrics] == [8, 8, 8, 1] * 2
    for step, other in zip(metrics, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert (final - expected_final).norm() / expected_final.norm() < 1e-5
    start = weights(plain_model(tiny_folder))
    assert (final - start).norm() / start.norm() > 1e-2, "nothing was trained"
    most = max(m["num_micro_batches"] for m in metrics)
    assert most == 1 if flags["max_tokens"] == 100_000 else most > 1


def test_a_run_repeats_itself_to_the_last_bit(mixed_data, tiny_folder, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    results = []
    for folder in folders:
        folder.mkdir()
        results.append(train_packed(mixed_data, tiny_folder, folder, num_workers=0, max_tokens=400))
    assert [m["loss"] for m in results[0][0]] == [m["loss"] for m in results[1][0]]
    assert torch.equal(results[0][1], results[1][1])


def test_learning_rate_warms_up_from_above_zero_and_decays():
    rates = [learning_rate_at(i, 100, 1.0, 0.1) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001
    assert learning_rate_at(0, 1, 1.0, 0.0) == 1.0


def test_only_matrices_decay(tiny_folder):
    optimizer = build_optimizer(plain_model(tiny_folder), tiny_config(weight_decay=0.1))
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
