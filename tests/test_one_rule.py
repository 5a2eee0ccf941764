"""Memory and machine settings never change the mathematics."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import finetune
from finetune import train
from helpers import CPU, plain_model, read_metrics, set_up, tiny_config, weights
from util.data.sample import IGNORE
from util.optim import build_optimizer, learning_rate_at

FLAGS = {"batch_size": 8, "num_epochs": 2, "learning_rate": 1e-3}
FLAGS |= {"precision": "fp32", "num_workers": 0}


def alone_inputs(run, sample):
    """Return the inputs of one sample as a processor would give them: clips as clips."""
    inputs = {"input_ids": sample.input_ids[None], "position_ids": sample.position_ids[:, None]}
    parts = sample.patches.split([t * h * w for t, h, w in sample.grids])
    for kind, grids, pixels in (
        ("image", "image_grid_thw", "pixel_values"),
        ("video", "video_grid_thw", "pixel_values_videos"),
    ):
        chosen = [i for i, media_type in enumerate(sample.media_types) if media_type == kind]
        if chosen:
            inputs[grids] = torch.tensor([sample.grids[i] for i in chosen])
            inputs[pixels] = run.build_inputs.normalize(torch.cat([parts[i] for i in chosen]))
    return inputs


@pytest.fixture(scope="module")
def plain(mixed_data, small_folder):
    """Train with each sample by itself, nothing packed, and the gradients summed up."""
    run = set_up(tiny_config(train_data=[mixed_data], **FLAGS), small_folder)
    model = plain_model(small_folder).train()
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


def count_graphs(monkeypatch) -> list[int]:
    """Return a list that gets at the beginning of each step how many graphs are compiled."""
    torch._dynamo.reset()
    counters.clear()
    num_graphs, set_learning_rate = [], finetune.set_learning_rate

    def count(*args):
        num_graphs.append(counters["stats"]["unique_graphs"])
        return set_learning_rate(*args)

    monkeypatch.setattr(finetune, "set_learning_rate", count)
    return num_graphs


@pytest.mark.parametrize(
    "flags",
    [
        {"max_tokens": 100_000},  # a step is one micro-batch
        {"max_tokens": 300, "num_workers": 2},  # several samples in each
        {"max_tokens": 177},  # just what the longest sample takes: about one in each
        *({"gradient_checkpointing": layers} for layers in ("llm", "vision", "all")),
        pytest.param({"compile": True, "max_tokens": 300}, marks=pytest.mark.slow),
        pytest.param(
            {"compile": True, "max_tokens": 300, "gradient_checkpointing": "all"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["whole_step", "packed_by_workers", "one_by_one", "llm", "vision", "all"]
    + ["compiled", "compiled_all"],
)
def test_memory_and_workers_do_not_change_the_run(
    flags, plain, mixed_data, small_folder, tmp_path, monkeypatch
):
    num_graphs = count_graphs(monkeypatch)
    flags = FLAGS | flags | {"train_data": [mixed_data], "output_dir": str(tmp_path)}
    run = set_up(tiny_config(**flags), small_folder)
    torch.manual_seed(0)
    train(run.config, run.model, run.processor, run.data, None, 8, CPU)
    metrics, final = read_metrics(tmp_path), weights(run.model)
    expected, expected_final = plain
    assert [m["num_samples"] for m in metrics] == [8, 8, 8, 1] * 2
    for step, other in zip(metrics, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert (final - expected_final).norm() / expected_final.norm() < 1e-5
    start = weights(plain_model(small_folder))
    assert (final - start).norm() / start.norm() > 1e-2, "nothing was trained"
    most = max(m["num_micro_batches"] for m in metrics)
    assert (most > 1) == (flags.get("max_tokens", 100_000) < 100_000)
    # All is compiled in the first step, whatever lengths come then; but what packed_sdpa returns,
    # which is not compiled, is another kind of view where a row is one segment alone.
    assert (num_graphs[1] > 0) == run.config.compile and num_graphs[7] - num_graphs[1] <= 1


def test_learning_rate_warms_up_from_above_zero_and_decays():
    rates = [learning_rate_at(i, 100, 1.0, 0.1) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001
    assert learning_rate_at(0, 1, 1.0, 0.0) == 1.0


def test_only_matrices_decay(small_folder):
    optimizer = build_optimizer(plain_model(small_folder), tiny_config(weight_decay=0.1))
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
