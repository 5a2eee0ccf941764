"""Several ranks draw the same curve as one, hold only their share, and end together."""

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    REPO,
    assistant,
    image,
    make_image,
    make_video,
    set_up,
    text,
    tiny_config,
    user,
    video,
    write_data,
)
from families import build_family
from safetensors.torch import load_file
from test_end_to_end import run_script
from transformers import AutoModelForImageTextToText

import finetune
from finetune import train
from util.checkpoint import damage, list_checkpoints
from util.config import UserError
from util.data.index import Index
from util.data.plan import Plan
from util.distributed import build_mesh, rank_metrics, start_processes
from util.model.load import export_model, load_model, load_processor
from util.run import EXIT_STOPPED

DRIVER = REPO / "tests" / "distributed_driver.py"
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
FLAGS = {"batch_size": 8, "learning_rate": 1e-3, "num_epochs": 3, "max_tokens": 400}


def flags_of(**flags):
    pairs = {"model_name_or_path": "tiny", "num_workers": 0} | flags
    return [
        str(part)
        for name, value in pairs.items()
        for part in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


def start(*command, **environment):
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=REPO,
        env=ENVIRONMENT | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def torchrun(num_ranks, *script):
    return start(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", num_ranks, *script),
    )


def finish(process, timeout, code=0):
    """Wait for a launcher, end it where that takes too long, and return what was printed."""
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its ranks
        printed, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s:\n{printed}")
    assert process.returncode == code, printed
    return printed


def drive(tmp_path, num_ranks, cases, timeout=300, code=0):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    return finish(torchrun(num_ranks, DRIVER, path), timeout, code)


def read_metrics(output_dir):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------ the two scripts


def code_without(path, mark):
    """Return the lines of a script below its docstring, without those that end in a mark."""
    source = path.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    lines = source.splitlines()[docstring.end_lineno :]
    assert any(line.endswith(f"  # {mark}") for line in lines)
    return [line for line in lines if not line.endswith(f"  # {mark}")]


def test_the_distributed_script_differs_only_in_marked_lines():
    single = code_without(REPO / "finetune.py", "single")
    distributed = code_without(REPO / "finetune_distributed.py", "dist")
    assert distributed == single


# ------------------------------------------------------------------ the one rule


def train_alone(data, folder, output_dir, num_steps, **flags):
    """Train with finetune.train() in this process; return metrics and weights by name."""
    output_dir.mkdir(parents=True)
    flags = FLAGS | flags | {"train_data": [data], "output_dir": str(output_dir)}
    run = set_up(tiny_config(**flags), folder)
    eval_data = run.data if run.config.eval_data else None
    train(run.config, run.model, run.processor, run.data, eval_data, num_steps, CPU)
    export_model(run.model, load_processor(folder, run.config), output_dir)
    return read_metrics(output_dir), {n: p.detach() for n, p in run.model.named_parameters()}


@pytest.fixture(scope="module")
def alone(mixed_data, tiny_folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("alone") / "out"
    return output_dir, *train_alone(mixed_data, tiny_folder, output_dir, 10, precision="fp32")


def fp32_case(data, output_dir, shard_size):
    flags = FLAGS | {"train_data": data, "precision": "fp32", "max_steps": 10}
    return {"argv": flags_of(**flags, shard_size=shard_size, output_dir=output_dir)}


def bf16_case(data, output_dir, num_steps, **flags):
    flags = FLAGS | {"train_data": data, "precision": "bf16", "max_steps": num_steps} | flags
    return {"argv": flags_of(**flags, output_dir=output_dir)}


# Everything that saves memory, but what rounds: fp32.
SAVERS = {"gradient_checkpointing": "all", "lora_rank": 4, "train": ["llm", "vision"]}

# Saved after an evaluation: what that gathers must be sharded again.
ANSWERS = {"eval_steps": 4, "eval_generate": 3, "save_steps": 4}


def savers_case(data, output_dir):
    flags = FLAGS | SAVERS | ANSWERS | {"train_data": data, "eval_data": data}
    return {"argv": flags_of(**flags, precision="fp32", max_steps=4, output_dir=output_dir)}


SKIP = {"precision": "fp32", "on_bad_sample": "skip"}


def skip_case(data, output_dir):
    flags = FLAGS | SKIP | {"train_data": data, "eval_data": data, "max_steps": 4}
    return {"argv": flags_of(**flags, output_dir=output_dir), "hook": "measure badly"}


def adversarial_case(data, output_dir, num_steps):
    flags = {"train_data": data, "precision": "fp32", "batch_size": 3, "num_epochs": 100}
    flags |= {"max_steps": num_steps, "max_tokens": 200, "output_dir": output_dir}
    return {"argv": flags_of(**flags), "hook": "adversarial"}


def case_of_20_steps(data, output_dir, hook=None, **flags):
    flags = FLAGS | {"train_data": data, "precision": "fp32", "num_epochs": 5} | flags
    return {"argv": flags_of(**flags, output_dir=output_dir), "hook": hook}


def copy_checkpoint(output_dir, step, other):
    """Make of a run what it was at a checkpoint, with later lines that resuming has to drop."""
    other.mkdir()
    for name in ("metrics.jsonl", "train.log"):
        shutil.copy(output_dir / name, other)
    shutil.copytree(output_dir / f"checkpoint-{step}", other / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def two_ranks(mixed_data, split_data, unlike_data, faulty_data, twenty_steps, tmp_path_factory):
    """Several runs of two ranks, one after the other: starting takes longer than running."""
    folder = tmp_path_factory.mktemp("two")
    copy_checkpoint(twenty_steps[0], 7, folder / "one-to-two")
    latest = {"resume_from": "latest"}
    cases = [
        case_of_20_steps(mixed_data, folder / "resumed", "stop after 7", num_workers=1),
        case_of_20_steps(mixed_data, folder / "resumed", **latest, num_workers=1),
        case_of_20_steps(mixed_data, folder / "one-to-two", **latest),
        *(fp32_case(mixed_data, folder / f"fp32-{size}", size) for size in (1, 2)),
        case_of_20_steps(mixed_data, folder / "late", "stop late"),
        case_of_20_steps(mixed_data, folder / "full", "fail to export", max_steps=4, save_steps=2),
        savers_case(mixed_data, folder / "savers"),
        skip_case(faulty_data, folder / "skip"),
        bf16_case(split_data[0], folder / "bf16", 5),
        bf16_case(split_data[0], folder / "bf16-lora", 5, lora_rank=4),
        adversarial_case(unlike_data, folder / "adversarial", 20),
    ]
    drive(folder, 2, cases)
    return folder


@pytest.mark.parametrize("shard_size", [1, 2])
def test_two_ranks_do_not_change_the_run(shard_size, alone, two_ranks):
    check_same_run(two_ranks / f"fp32-{shard_size}", *alone)


def test_two_ranks_leave_out_what_one_process_leaves_out(
    two_ranks, faulty_data, tiny_folder, tmp_path
):
    flags = SKIP | {"eval_data": [faulty_data]}
    metrics, _ = train_alone(faulty_data, tiny_folder, tmp_path / "a", 4, **flags)
    assert metrics[0] == {"global_step": 0, "num_bad_samples": 1}
    assert sum(row.get("num_bad_samples", 0) for row in metrics) > 1
    for step, other in zip(read_metrics(two_ranks / "skip"), metrics, strict=True):
        assert step.get("num_bad_samples") == other.get("num_bad_samples")
        for name in {"loss", "eval_loss"} & set(step):
            assert step[name] == pytest.approx(other[name], rel=1e-5)


def test_two_ranks_train_the_adapter_of_one(two_ranks, mixed_data, tiny_folder, tmp_path):
    flags = SAVERS | {"precision": "fp32", "eval_data": [mixed_data]} | ANSWERS
    metrics, _ = train_alone(mixed_data, tiny_folder, tmp_path / "a", 4, **flags)
    for step, other in zip(read_metrics(two_ranks / "savers"), metrics, strict=True):
        if "eval_loss" in step:
            assert step["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
            rate = "eval_character_error_rate"
            assert step[rate] == pytest.approx(other[rate])
            continue
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (two_ranks / "savers", tmp_path / "a")
    )
    assert set(ours) == set(theirs)
    difference = sum((ours[name] - theirs[name]).square().sum() for name in ours).sqrt()
    assert difference <= 1e-5 * sum(tensor.square().sum() for tensor in theirs.values()).sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks, shard_sizes", [(1, [1]), (4, [1, 2, 4])])
def test_any_ranks_do_not_change_the_run(num_ranks, shard_sizes, alone, mixed_data, tmp_path):
    cases = [fp32_case(mixed_data, tmp_path / str(size), size) for size in shard_sizes]
    drive(tmp_path, num_ranks, cases)
    for size in shard_sizes:
        check_same_run(tmp_path / str(size), *alone)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_two_ranks_do_not_change_the_run_of_other_families(
    family, mixed_data, tiny_folder, tmp_path
):
    folder = build_family(family, tiny_folder, tmp_path / "model")
    limits = {"max_pixels": 50176, "video_max_pixels": 25088, "precision": "fp32"}
    single = tmp_path / "alone"
    alone = train_alone(mixed_data, folder, single, 10, **limits)
    flags = FLAGS | limits | {"train_data": mixed_data, "max_steps": 10, "shard_size": 2}
    flags |= {"model_name_or_path": folder, "output_dir": tmp_path / "ranks", "device": "cpu"}
    drive(tmp_path, 2, [{"argv": flags_of(**flags)}])
    check_same_run(tmp_path / "ranks", single, *alone)


def check_same_run(output_dir, single_output_dir, metrics, weights):
    """The run in `output_dir` is the run of one process: every step, the weights, the export."""
    assert [m["num_samples"] for m in metrics] == [8, 8, 8, 1] * 2 + [8, 8]
    for step, other in zip(read_metrics(output_dir), metrics, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        for key in ("num_samples", "num_tokens", "num_supervised_tokens", "learning_rate"):
            assert step[key] == other[key]
    final = torch.load(output_dir / "final.pt")
    assert relative_difference(final, weights) < 1e-5
    check_export(output_dir, single_output_dir, final)


def relative_difference(weights, expected):
    """Return the difference of two models, weights by name, in the norm of the whole model."""
    assert set(weights) == set(expected)
    difference = sum((weights[n] - w).square().sum() for n, w in expected.items()).sqrt()
    return difference / sum(w.square().sum() for w in expected.values()).sqrt()


def check_export(output_dir, single_output_dir, final):
    """The folder holds the files and settings that export_model writes, and the final weights."""
    names = {p.name for p in single_output_dir.iterdir()}
    assert names <= {p.name for p in output_dir.iterdir()}
    for name in names - {"model.safetensors", "metrics.jsonl", "checkpoint-10"}:
        assert (output_dir / name).read_text() == (single_output_dir / name).read_text(), name
    model = AutoModelForImageTextToText.from_pretrained(output_dir)
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, final[name].bfloat16()), name


def held_out_loss(model_dir, data, tiny_folder):
    """Return the loss per supervised token of a model folder on the samples of `data`."""
    run = set_up(tiny_config(train_data=[data], batch_size=100, max_tokens=2000), tiny_folder)
    model = load_model(str(model_dir), "packed_sdpa", CPU, run.config)
    total, step = 0.0, run.plan.step(0)
    for samples in step.micro_batches[0]:
        micro_batch = run.data.samples.collate([run.data.samples[i] for i in samples])
        with torch.no_grad():
            logits = model(**run.build_inputs(micro_batch)).logits[0]
        total += F.cross_entropy(logits, micro_batch.targets, reduction="sum").item()
    return total / step.num_supervised_tokens


@pytest.fixture(scope="module")
def split_data(mixed_data, tmp_path_factory):
    """mixed_data in two: 20 samples to train on, 5 held out."""
    records = json.loads(Path(mixed_data).read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("split")
    conversations = [record["messages"] for record in records]
    return (
        write_data(folder / "train.json", conversations[:20]),
        write_data(folder / "held_out.json", conversations[20:]),
    )


def test_bf16_follows_one_process(two_ranks, split_data, tiny_folder, tmp_path):
    metrics, _ = train_alone(split_data[0], tiny_folder, tmp_path / "a", 5, precision="bf16")
    losses = [m["loss"] for m in read_metrics(two_ranks / "bf16")]
    assert losses == pytest.approx([m["loss"] for m in metrics], rel=1e-3)


def test_adapters_on_frozen_bf16_weights_follow_one_process(
    two_ranks, split_data, tiny_folder, tmp_path
):
    flags = {"precision": "bf16", "lora_rank": 4}
    metrics, _ = train_alone(split_data[0], tiny_folder, tmp_path / "a", 5, **flags)
    losses = [m["loss"] for m in read_metrics(two_ranks / "bf16-lora")]
    assert losses == pytest.approx([m["loss"] for m in metrics], rel=1e-3)


@pytest.mark.slow
def test_bf16_ends_where_one_process_ends(split_data, tiny_folder, tmp_path):
    flags = {"num_epochs": 100, "learning_rate": 3e-4}
    train_alone(split_data[0], tiny_folder, tmp_path / "alone", 200, precision="bf16", **flags)
    drive(tmp_path, 2, [bf16_case(split_data[0], tmp_path / "ranks", 200, **flags)], timeout=900)
    loss, other, start_loss = (
        held_out_loss(folder, split_data[1], tiny_folder)
        for folder in (tmp_path / "ranks", tmp_path / "alone", tiny_folder)
    )
    assert loss == pytest.approx(other, rel=0.01)
    assert other < 0.7 * start_loss, "nothing was learned"


# ------------------------------------------------------------------ exact resume


def run_alone(monkeypatch, output_dir, data, **flags):
    """Run finetune.main() in this process; return the folder, metrics, and weights by name."""
    models = []

    def export_and_keep(model, processor, folder):
        models.append(model)
        export_model(model, processor, folder)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "export_model", export_and_keep)
        argv = case_of_20_steps(data, output_dir, device="cpu", **flags)["argv"]
        patch.setattr(sys, "argv", ["finetune.py", *argv])
        finetune.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    weights = {name: p.detach() for name, p in models[-1].named_parameters()}
    return output_dir, read_metrics(output_dir), weights


@pytest.fixture(scope="module")
def twenty_steps(mixed_data, tmp_path_factory):
    """20 steps of one process, straight, with a checkpoint after the seventh."""
    output_dir = tmp_path_factory.mktemp("twenty") / "out"
    with pytest.MonkeyPatch.context() as patch:
        return run_alone(patch, output_dir, mixed_data, save_steps=7, keep_checkpoints=3)


def check_twenty_steps(metrics, weights, expected):
    """Every step once, losses to 1e-5, weights to 1e-5 in the norm of the whole model."""
    _, expected_metrics, expected_weights = expected
    assert [m["global_step"] for m in metrics] == list(range(1, 21))
    for step, other in zip(metrics, expected_metrics, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert step["learning_rate"] == other["learning_rate"]
    assert relative_difference(weights, expected_weights) < 1e-5


@pytest.mark.parametrize("name", ["resumed", "one-to-two"])
def test_two_ranks_resume_the_run_that_would_have_been(name, two_ranks, twenty_steps):
    """In the middle of an epoch: after two ranks, and after one process."""
    metrics, weights = read_metrics(two_ranks / name), torch.load(two_ranks / name / "final.pt")
    check_twenty_steps(metrics, weights, twenty_steps)
    # It went on from step 7, and did not begin anew.
    assert "resumed    from" in (two_ranks / name / "train.log").read_text()


def test_one_process_resumes_a_run_of_two_ranks(
    two_ranks, twenty_steps, mixed_data, tmp_path, monkeypatch
):
    copy_checkpoint(two_ranks / "resumed", 7, tmp_path / "out")
    flags = {"resume_from": "latest", "num_workers": 1}
    _, metrics, weights = run_alone(monkeypatch, tmp_path / "out", mixed_data, **flags)
    check_twenty_steps(metrics, weights, twenty_steps)
    assert "resumed    from" in (tmp_path / "out" / "train.log").read_text()


@pytest.mark.slow
def test_any_number_of_ranks_resumes_at_an_epochs_end(twenty_steps, mixed_data, tmp_path):
    """Two ranks to four, sharded by two, in two replicas; four to two; two alone."""
    first = {"save_steps": 8}
    stop, go_on = "stop after 8", {"resume_from": "latest"}
    drive(tmp_path, 2, [case_of_20_steps(mixed_data, tmp_path / "a", stop, **first, shard_size=1)])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    cases = [
        case_of_20_steps(mixed_data, tmp_path / "a", **go_on, shard_size=2),
        case_of_20_steps(mixed_data, tmp_path / "c", stop, shard_size=4),
    ]
    drive(tmp_path, 4, cases)
    drive(tmp_path, 2, [case_of_20_steps(mixed_data, tmp_path / name, **go_on) for name in "bc"])
    for name in "abc":
        weights = torch.load(tmp_path / name / "final.pt")
        check_twenty_steps(read_metrics(tmp_path / name), weights, twenty_steps)


# ------------------------------------------------------------------ what ranks hold


def test_a_signal_after_the_ranks_have_agreed_counts_in_the_next_step(two_ranks):
    (checkpoint,) = list_checkpoints(two_ranks / "late")
    assert checkpoint.name == "checkpoint-4" and damage(checkpoint) is None
    assert [row["global_step"] for row in read_metrics(two_ranks / "late")] == [1, 2, 3, 4]


def test_an_export_that_fails_on_the_main_process_is_survived_by_all(two_ranks):
    (checkpoint,) = list_checkpoints(two_ranks / "full")
    assert checkpoint.name == "checkpoint-4" and damage(checkpoint) is None
    log = (two_ranks / "full" / "train.log").read_text()
    assert "checkpoint-2 could not be written" in log and "No space left" in log


@pytest.mark.slow  # torchao compiles its step
@pytest.mark.timeout(1800)
def test_two_ranks_train_in_bf16_lean_and_one_goes_on(mixed_data, tmp_path):
    def case(name, **flags):
        flags = {"precision": "bf16_lean", "save_steps": 2, "num_epochs": 1} | flags
        flags = FLAGS | {"train_data": mixed_data, "learning_rate": 1e-4} | flags
        return flags_of(**flags, output_dir=tmp_path / name)

    cases = [{"argv": case(f"shard-{size}", shard_size=size)} for size in (1, 2)]
    drive(tmp_path, 2, cases, timeout=900)
    run_script("finetune.py", *case("alone"))
    alone = read_metrics(tmp_path / "alone")
    for size in (1, 2):
        # Where weights are rounded is drawn anew by each rank; before the first step, nothing is.
        metrics = read_metrics(tmp_path / f"shard-{size}")
        assert metrics[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-3)
        assert metrics[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=0.02)
    # Moments of 8 bits are made for other shards: two ranks' on one, one's on two.
    copy_checkpoint(tmp_path / "shard-2", 2, tmp_path / "two-to-one")
    copy_checkpoint(tmp_path / "alone", 2, tmp_path / "one-to-two")
    run_script("finetune.py", *case("two-to-one", resume_from="latest"))
    drive(tmp_path, 2, [{"argv": case("one-to-two", resume_from="latest")}], timeout=900)
    for name in ("two-to-one", "one-to-two"):
        metrics = read_metrics(tmp_path / name)
        assert [row["global_step"] for row in metrics] == [1, 2, 3, 4]
        assert metrics[2]["loss"] == pytest.approx(alone[2]["loss"], rel=5e-3)


def test_tokens_by_rank_add_up_and_dummy_work_is_told():
    lengths = torch.tensor([50, 40, 30, 20, 10]).numpy()
    index = Index(lengths, lengths // 2, lengths // 5, lengths // 10, lengths * 0)
    step = Plan(index, 5, 60, 0, world_size=3).step(0)
    metrics = rank_metrics(Plan(index, 5, 60, 0, world_size=3), step, num_dummy_tokens=5)
    hands = [[i for micro in rank for i in micro] for rank in step.micro_batches]
    for rank, hand in enumerate(hands):
        image_tokens = sum(lengths[i] // 5 for i in hand)
        video_tokens = sum(lengths[i] // 10 for i in hand)
        total = sum(lengths[i] for i in hand)
        assert metrics["num_image_tokens_by_rank"][rank] == image_tokens
        assert metrics["num_video_tokens_by_rank"][rank] == video_tokens
        assert metrics["num_text_tokens_by_rank"][rank] == total - image_tokens - video_tokens
        dummy = 5 * len(step.micro_batches[rank])
        assert metrics["dummy_share_by_rank"][rank] == round(dummy / (total + dummy), 4)
    one_sample = Plan(index, 1, 60, 0, world_size=2)
    assert rank_metrics(one_sample, one_sample.step(0), 5)["dummy_share_by_rank"][1] == 1.0


@pytest.fixture(scope="module")
def large_folder(tiny_folder, tmp_path_factory):
    """A model of 100 M parameters with tiny's processor, its weights in several files."""
    folder = tmp_path_factory.mktemp("large")
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float32)
    config, generation_config = model.config, model.generation_config
    config.text_config.update(
        {"hidden_size": 768, "intermediate_size": 2816, "num_hidden_layers": 13}
        | {"num_attention_heads": 12, "layer_types": ["full_attention"] * 13}
        | {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    )
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    config.vision_config.hidden_size = 768
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = generation_config
    model.save_pretrained(folder, max_shard_size="60MB")
    load_processor(tiny_folder, tiny_config()).save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder, sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_memory_falls_with_the_shard_size(large_folder, mixed_data, tmp_path):
    folder, num_parameters = large_folder
    assert 80e6 < num_parameters < 130e6
    whole = 4 * num_parameters
    flags = {"precision": "fp32", "max_steps": 2, "num_epochs": 1, "learning_rate": 1e-4}
    flags |= {"max_pixels": 50176, "video_max_pixels": 25088}
    alone, _ = train_alone(mixed_data, str(folder), tmp_path / "alone", 2, **flags)
    flags |= {"model_name_or_path": folder, "train_data": mixed_data, "batch_size": 8}
    for size in (1, 2, 4):
        output_dir = tmp_path / str(size)
        argv = flags_of(**flags, max_tokens=400, shard_size=size, output_dir=output_dir)
        drive(tmp_path, 4, [{"argv": argv, "hook": "memory"}], timeout=600)
        # Its embeddings are not tied, so they are sharded otherwise than tiny's.
        for step, other in zip(read_metrics(output_dir), alone, strict=True):
            assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        reports = [json.loads((output_dir / f"memory-{r}.json").read_text()) for r in range(4)]
        print(f"shard size {size}, {whole:,} bytes of parameters: {reports}")
        for report in reports:
            # Uneven shards and the padding of small parameters are the 5 %.
            assert report["parameters"] == pytest.approx(whole / size, rel=0.05)
            assert report["gradients"] == pytest.approx(whole / size, rel=0.05)
            assert report["optimizer"] == pytest.approx(2 * whole / size, rel=0.05)
            # The shards themselves, and never a second copy beside them.
            assert report["peak_of_loading"] < whole / size + 0.15 * whole
        # One copy in bf16, on the main rank alone.
        assert 0.4 * whole < reports[0]["peak_of_exporting"] < 0.75 * whole
        assert max(r["peak_of_exporting"] for r in reports[1:]) < 0.25 * whole


# ------------------------------------------------------------------ no hang, and ends


@pytest.fixture(scope="module")
def unlike_data(tmp_path_factory):
    """12 samples, four each of text, image and video."""
    folder = tmp_path_factory.mktemp("unlike")
    picture = image(make_image(folder / "a.png", 60, 90))
    clip = video(make_video(folder / "a.mp4", 8, 64, 64))
    media = [(), (picture,), (clip,)]
    return write_data(
        folder / "data.json",
        [[user(*media[i % 3], text(f"What {i}?")), assistant(f"That {i}.")] for i in range(12)],
    )


@pytest.fixture(scope="module")
def faulty_data(tmp_path_factory):
    """16 samples: one without its picture, one with half of it, which only decoding finds."""
    folder = tmp_path_factory.mktemp("faulty")
    pictures = [Path(make_image(folder / f"{i}.png", 80, 90, i)) for i in range(8)]
    pictures[2].write_bytes(pictures[2].read_bytes()[:2000])
    pictures[5].unlink()
    samples = [[user(text(f"What {i}?")), assistant(f"That {i}. " * (i % 5))] for i in range(16)]
    for i, path in enumerate(pictures):
        samples[2 * i][0]["content"].append(image(str(path)))
    return write_data(folder / "data.json", samples)


def test_ranks_with_unlike_samples_do_not_hang(two_ranks):
    check_unlike_ranks(two_ranks / "adversarial", 20)


@pytest.mark.slow
def test_200_steps_of_unlike_samples_do_not_hang(unlike_data, tmp_path):
    drive(tmp_path, 2, [adversarial_case(unlike_data, tmp_path / "out", 200)], timeout=240)
    check_unlike_ranks(tmp_path / "out", 200)


def check_unlike_ranks(output_dir, num_steps):
    """All steps were done, also with ranks that had no sample, only text, or other media."""
    metrics = read_metrics(output_dir)
    assert len(metrics) == num_steps

    def kinds(m, rank):
        return tuple(m[f"num_{k}_tokens_by_rank"][rank] > 0 for k in ("text", "image", "video"))

    seen = {(kinds(m, 0), kinds(m, 1)) for m in metrics}
    nothing, only_text = (False, False, False), (True, False, False)
    assert any(nothing in pair for pair in seen)
    assert any(only_text in pair and any(k[1] or k[2] for k in pair) for pair in seen)
    assert any(a[1] and not a[2] and b[2] and not b[1] for a, b in seen | {p[::-1] for p in seen})


def seconds_since_last_written(path):
    return time.time() - path.stat().st_mtime


@pytest.mark.parametrize(
    "hook, said",
    [
        # A bad sample, below, is an error of one rank too.
        pytest.param(
            "raise", "OutOfMemoryError: rank one ran out of memory", marks=pytest.mark.slow
        ),
        ("kill", "Signal 9 (SIGKILL)"),
    ],
)
def test_one_rank_that_fails_ends_all(hook, said, mixed_data, tmp_path):
    flags = FLAGS | {"train_data": mixed_data, "precision": "fp32", "output_dir": tmp_path / "out"}
    printed = drive(tmp_path, 2, [{"argv": flags_of(**flags), "hook": hook}], code=1)
    assert seconds_since_last_written(tmp_path / "out" / "metrics.jsonl") < 60
    root_cause = printed[printed.index("Root Cause") :]
    assert said in root_cause and re.search(r"rank +: 1 ", root_cause)
    assert printed.count(said) == 1 and "gloo" not in printed and "Connection" not in printed


def test_a_bad_sample_on_one_rank_ends_all(tmp_path):
    path = Path(make_image(tmp_path / "cut.png", 200, 200))
    path.write_bytes(path.read_bytes()[:-2000])
    samples = [[user(text(f"Hi {i}")), assistant("Hello. " * 20)] for i in range(3)]
    data = write_data(
        tmp_path / "data.json", [*samples, [user(image(str(path)), text("?")), assistant("x")]]
    )
    flags = {"train_data": data, "precision": "fp32", "output_dir": tmp_path / "out"}
    flags |= {"num_epochs": 3}
    printed = finish(torchrun(2, "finetune_distributed.py", *flags_of(**flags)), 180, code=1)
    assert seconds_since_last_written(tmp_path / "out" / "train.log") < 60
    last = printed[printed.index("Root Cause") :]
    assert "UserError" in last and "sample 3" in last and str(path) in last
    assert printed.count("sample 3") == 1 and "gloo" not in printed
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_picture_that_changed_on_one_rank_costs_no_step(tmp_path, tiny_folder):
    """All ranks save the steps done, though one alone has read it; --on_bad_sample skip or not."""
    paths = [make_image(tmp_path / f"{i}.png", 90, 90, i) for i in range(12)]
    samples = [[user(image(path), text("?")), assistant("x")] for path in paths]
    data = write_data(tmp_path / "data.json", samples)
    prepared = set_up(tiny_config(train_data=[data], batch_size=4), tiny_folder)  # indexed
    changed = prepared.data.plan.step(2).samples[1]
    make_image(tmp_path / f"{changed}.png", 160, 160)
    flags = {"train_data": data, "output_dir": tmp_path / "out", "batch_size": 4, "num_epochs": 1}
    flags |= {"on_bad_sample": "skip", "precision": "fp32"}
    printed = finish(torchrun(2, "finetune_distributed.py", *flags_of(**flags)), 180, code=1)
    last = printed[printed.index("Root Cause") :]
    assert f"sample {changed}" in last and "its media have changed" in last
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    assert checkpoint.name == "checkpoint-2" and damage(checkpoint) is None


def test_a_mistake_is_told_once(tmp_path):
    data = write_data(tmp_path / "data.json", [[user("Hi")]])
    printed = finish(
        torchrun(2, "finetune_distributed.py", *flags_of(train_data=data)), 180, code=1
    )
    assert printed.count("no assistant message") == 1


def test_a_shard_size_must_divide_the_number_of_ranks():
    with pytest.raises(UserError, match="--shard_size 3: must divide the number of processes, 4"):
        build_mesh(SimpleNamespace(num_processes=4, device=CPU), 3)


def test_without_a_launcher_it_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"\./finetune_distributed\.sh"):
        start_processes(tiny_config(), CPU)


# ------------------------------------------------------------------ the launcher


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_the_launcher_trains_tiny_without_a_gpu(tmp_path):
    out = tmp_path / "out"
    flags = ("--max_steps", 3, "--output_dir", out, "--report_to", "tensorboard")
    printed = finish(start("./finetune_distributed.sh", *flags), 120)
    assert printed.count("TINY") == 1 and "ranks      2" in printed
    assert len(read_metrics(out)) == 3
    names = {path.name for path in out.iterdir() if not path.name.startswith("events.out")}
    assert len(names) == len(list(out.iterdir())) - 1
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("config_used.json", "train.log", "metrics.jsonl", "loss.png", "checkpoint-3"),
    }


def two_machines(launcher, *flags, **environment):
    """Start two launchers on one machine, which find each other as two machines would."""
    # Two devices are named, so that accelerate launch is used; the flags choose the CPU.
    devices = {"CUDA_VISIBLE_DEVICES": "0,1" if launcher == "accelerate" else ""}
    environment = {"NUM_MACHINES": "2", "MAIN_PROCESS_PORT": free_port()} | devices | environment
    flags = ["--model_name_or_path", "tiny", "--device", "cpu", *flags]
    return [
        start("./finetune_distributed.sh", *flags, MACHINE_RANK=str(rank), **environment)
        for rank in range(2)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_exits_with_75(number, tmp_path):
    """SIGTERM reaches the launcher alone, as queues send it, Ctrl-C every process of its group."""
    output_dir = tmp_path / "out"
    flags = ("--num_epochs", 500, "--output_dir", output_dir)
    process = start("./finetune_distributed.sh", *flags)
    deadline = time.monotonic() + 120
    metrics = output_dir / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 1):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.1)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    printed = finish(process, 60, code=EXIT_STOPPED)
    assert printed.splitlines()[-1].startswith("Stopped by a signal, and saved.")
    (checkpoint,) = list_checkpoints(output_dir)
    assert checkpoint.name == f"checkpoint-{len(metrics.read_text().splitlines())}"
    assert damage(checkpoint) is None


def test_machines_that_share_no_disk_are_told(tmp_path):
    """Each of the two ranks runs in a folder of its own, as on a machine of its own."""
    script = tmp_path / "apart.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(REPO)!r})\n"
        "folder = os.path.join(os.path.dirname(__file__), os.environ['RANK'])\n"
        "os.makedirs(folder)\nos.chdir(folder)\n"
        "import finetune_distributed\nfrom util import distributed, run\n"
        "distributed.SHARED_FOLDER_SECONDS = 1\n"
        "run.run_rank(finetune_distributed.main)\n"
    )
    data = REPO / "train_data" / "data.json"
    flags = flags_of(train_data=data, output_dir="a/b", max_steps=2)
    printed = finish(torchrun(2, script, *flags), 180, code=1)
    last = printed[printed.index("Root Cause") :]
    assert "must be on a disk that all machines share" in last and "not seen by" in last


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_train_one_model(launcher, tmp_path):
    out = tmp_path / "out"
    machines = two_machines(launcher, "--max_steps", 4, "--output_dir", out)
    printed = [finish(machine, 400) for machine in machines]
    assert "4: 2 replicas, each over 2" in printed[0] and "step" not in printed[1]
    alone = tmp_path / "alone"
    finish(start("./finetune.sh", "--max_steps", 4, "--output_dir", alone), 200)
    losses = [[m["loss"] for m in read_metrics(folder)] for folder in (out, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 4


@pytest.mark.slow
def test_a_rank_killed_on_one_machine_ends_the_other(tmp_path):
    out = tmp_path / "out"
    machines = two_machines("torchrun", "--num_epochs", 10_000, "--output_dir", out)
    deadline = time.time() + 300
    while not (out / "metrics.jsonl").exists():
        assert time.time() < deadline and machines[1].poll() is None
        time.sleep(0.2)
    launcher = psutil.Process(machines[1].pid).children()[0]
    launcher.children()[0].kill()
    killed = time.time()
    printed = [finish(machine, 60, code=1) for machine in machines]
    assert time.time() - killed < 60
    assert "Signal 9 (SIGKILL)" in printed[1]
    # All that the other machine knows.
    assert "Connection" in printed[0]


# ------------------------------------------------------------------ GPUs


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("shard_size", [1, 2])
def test_two_gpus_follow_one(shard_size, tmp_path):
    """NCCL, bf16, and flash attention where it is installed, against finetune.py."""
    flags = ["--model_name_or_path", "tiny", "--precision", "bf16", "--max_steps", 5]
    devices = {"CUDA_VISIBLE_DEVICES": "0,1"}
    ranks = [*flags, "--shard_size", shard_size, "--output_dir", tmp_path / "ranks"]
    finish(start("./finetune_distributed.sh", *ranks, **devices), 300)
    alone = [*flags, "--output_dir", tmp_path / "alone"]
    finish(start(sys.executable, "finetune.py", *alone, **devices), 300)
    losses = [[m["loss"] for m in read_metrics(tmp_path / name)] for name in ("ranks", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
