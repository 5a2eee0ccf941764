"""Several ranks draw the same curve as one, hold only their share, and end together."""

import ast
import functools
import itertools
import json
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

import finetune
from families import build_family
from helpers import (
    REPO,
    assistant,
    call,
    finish,
    free_port,
    image,
    make_image,
    make_video,
    read_metrics,
    run_script,
    set_up,
    start,
    text,
    tiny_config,
    undamaged_steps,
    user,
    video,
    wait_for,
    write_data,
)
from util import distributed
from util.checkpoint import list_checkpoints
from util.config import UserError
from util.data.index import Index
from util.data.plan import Plan
from util.distributed import start_processes
from util.model.load import load_processor
from util.run import EXIT_STOPPED
from util.shards import ShardPlanner, ShardReader, read_index
from util.tools.flops import rank_metrics
from zygote import forking

DRIVER = REPO / "tests" / "distributed_driver.py"
FLAGS = {"device": "cpu", "num_workers": 0, "precision": "fp32"}
FLAGS |= {"batch_size": 8, "learning_rate": 1e-3, "num_epochs": 3, "max_tokens": 400}
FLAGS |= {"max_pixels": 50176, "video_max_pixels": 25088}
LATEST = {"resume_from": "latest"}


@pytest.fixture(scope="module", autouse=True)
def model(small_folder):
    """The model of all runs that name no other."""
    FLAGS["model_name_or_path"] = small_folder


def argv_of(output_dir, flags) -> list[str]:
    """Return the command line of a run: FLAGS, and `flags` beside or in place of them."""
    pairs = (FLAGS | flags | {"output_dir": output_dir}).items()
    values = {f"--{name}": value if isinstance(value, list) else [value] for name, value in pairs}
    return [str(part) for name, value in values.items() for part in (name, *value)]


def case(output_dir, flags, hook=None, end="") -> dict:
    """Return a run for distributed_driver.py."""
    return {"argv": argv_of(output_dir, flags), "hook": hook, "end": end}


def torchrun(num_ranks, *script):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return start(*launcher, "--nproc_per_node", num_ranks, *script)


def drive(folder, num_ranks, *cases, code=0):
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    return finish(torchrun(num_ranks, DRIVER, path), code=code)


def losses(output_dir) -> list[float]:
    return [row["loss"] for row in read_metrics(output_dir)]


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
    # Few lines are marked, few names stand at the head, and the training step fits on a screen.
    num_marked = 0
    for name, most_names in (("finetune.py", 25), ("finetune_distributed.py", 27)):
        source = (REPO / name).read_text(encoding="utf-8")
        num_marked += len(re.findall("  # (?:single|dist)$", source, re.M))
        imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
        own = [alias for node in imports if node.module.startswith("util.") for alias in node.names]
        assert len(own) <= most_names
    step = (REPO / "finetune.py").read_text("utf-8").split("for step in data.plan.steps(")[1]
    assert step.split("optimizer.zero_grad(")[0].count("\n") < 60
    assert num_marked <= 45


# ------------------------------------------------------------------ the one rule


@pytest.fixture(scope="module")
def data(mixed_data, tmp_path_factory) -> dict:
    """Data files by name."""
    folder = tmp_path_factory.mktemp("data")
    mixed = [record["messages"] for record in json.loads(Path(mixed_data).read_text("utf-8"))]
    picture = image(make_image(folder / "a.png", 60, 90))
    media = [(), (picture,), (video(make_video(folder / "a.mp4", 8, 64, 64)),)]
    faulty = [[user(text(f"What {i}?")), assistant(f"That {i}. " * (i % 5))] for i in range(16)]
    pictures = [Path(make_image(folder / f"{i}.png", 80, 90, i)) for i in range(8)]
    for i, path in enumerate(pictures):
        faulty[2 * i][0]["content"].append(image(str(path)))
    pictures[2].write_bytes(pictures[2].read_bytes()[:2000])  # only decoding finds that
    pictures[5].unlink()
    files = {
        "train": mixed[:20],
        "held_out": mixed[20:],
        "few": mixed[:3],  # whose answers are short
        # Four each of text, image and video.
        "unlike": [
            [user(*media[i % 3], text(f"What {i}?")), assistant(f"That {i}.")] for i in range(12)
        ],
        "faulty": faulty,
        "cut": [*mixed[:3], faulty[4]],
        "unanswered": [[user("Hi")]],
    }
    paths = {name: write_data(folder / f"{name}.json", files[name]) for name in files}
    return {"mixed": mixed_data} | paths


@pytest.fixture(scope="module")
def runs(data) -> dict:
    """What both one process and two ranks train: flags by name."""
    mixed, faulty, train, few = (data[name] for name in ("mixed", "faulty", "train", "few"))
    bf16 = {"train_data": train, "precision": "bf16", "batch_size": 4, "max_steps": 5}
    return {
        "twelve": {"train_data": mixed, "save_steps": 7, "keep_checkpoints": 3},
        # One sample has no picture, one half of it.
        "skip": {"train_data": faulty, "eval_data": faulty}
        | {"on_bad_sample": "skip", "max_steps": 4},
        # Everything that saves memory, but what rounds. Saved after an evaluation: what that
        # gathers must be sharded again.
        "savers": {"gradient_checkpointing": "all", "lora_rank": 4, "train": ["llm", "vision"]}
        | {"train_data": mixed, "eval_data": few, "eval_steps": 4, "eval_generate": 3}
        | {"save_steps": 4, "max_steps": 4},
        "bf16": bf16,
        "bf16-lora": bf16 | {"lora_rank": 4},
        "4bit": bf16 | {"lora_rank": 4, "precision": "bf16_4bit"},
        "early": {"train_data": mixed, "eval_data": few, "eval_steps": 1, "early_stopping": 1}
        | {"learning_rate": 0.5, "warmup_ratio": 1.0, "keep_checkpoints": 1},
    }


def train_alone(output_dir, flags):
    """Train with finetune.py in this process, and return the output folder."""
    call(finetune, *argv_of(output_dir, flags))
    return output_dir


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """Return the folder of a run by one process, which is trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda name: train_alone(folder / name, runs[name]))


def adversarial_case(output_dir, data, num_steps):
    flags = {"train_data": data["unlike"], "batch_size": 3, "max_tokens": 200}
    flags |= {"num_epochs": 100, "max_steps": num_steps}
    return case(output_dir, flags, "adversarial")


def copy_checkpoint(output_dir, step, other):
    """Make of a run what it was at a checkpoint, with later lines that resuming has to drop."""
    other.mkdir()
    for name in ("metrics.jsonl", "train.log"):
        shutil.copy(output_dir / name, other)
    shutil.copytree(output_dir / f"checkpoint-{step}", other / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def two_ranks(data, runs, alone, tmp_path_factory):
    """Several runs of two ranks, one after the other: starting takes longer than running."""
    folder = tmp_path_factory.mktemp("two")
    twelve = runs["twelve"]
    copy_checkpoint(alone("twelve"), 7, folder / "one-to-two")
    with_worker = twelve | {"num_workers": 1}
    full = {"train_data": data["mixed"], "max_steps": 4, "save_steps": 2}
    evaluated = full | {"eval_data": data["mixed"], "eval_steps": 2}
    cut, unanswered = {"train_data": data["cut"]}, {"train_data": data["unanswered"]}
    cases = [
        case(folder / "two-to-two", with_worker, "stop after 7", end=str(EXIT_STOPPED)),
        case(folder / "two-to-two", with_worker | LATEST),
        case(folder / "one-to-two", twelve | LATEST),
        case(folder / "replicas", twelve | {"shard_size": 1}),
        case(folder / "late", twelve, "stop late", end=str(EXIT_STOPPED)),
        case(folder / "evaluation", evaluated, "stop in evaluation", end=str(EXIT_STOPPED)),
        case(folder / "full", full, "fail to export"),
        *(case(folder / n, runs[n]) for n in ("savers", "bf16", "bf16-lora", "4bit", "early")),
        case(folder / "skip", runs["skip"], "measure badly"),
        # Mistakes, found in all places: every rank must raise them.
        case(folder / "size", {"shard_size": 3}, end="must divide the number of processes, 2"),
        case(folder / "unanswered", unanswered, end="no assistant message"),
        case(folder / "cut", cut, end=f"sample 3: message 0: {Path(data['cut']).parent / '2.png'}"),
        adversarial_case(folder / "adversarial", data, 20),
        case(folder / "copy", twelve, "other text", end="not the same on all machines: rank 1 ("),
        case("own/folder", twelve, "apart", end="part of the checkpoints there; not seen by"),
    ]
    drive(folder, 2, *cases)
    return folder


def test_two_replicas_do_not_change_the_run(alone, two_ranks):
    """Nor do two shards, of which test_two_ranks_and_one_resume... has every step."""
    rows = read_metrics(alone("twelve"))
    assert [row["num_samples"] for row in rows] == [8, 8, 8, 1] * 3
    check_same_run(two_ranks / "replicas", alone("twelve"))


def test_two_ranks_leave_out_what_one_process_leaves_out(two_ranks, alone):
    rows = read_metrics(alone("skip"))
    assert rows[0] == {"global_step": 0, "num_bad_samples": 1}
    assert sum(row.get("num_bad_samples", 0) for row in rows) > 1
    check_same_run(two_ranks / "skip", alone("skip"))


def test_two_ranks_train_the_adapter_of_one(two_ranks, alone):
    folders = two_ranks / "savers", alone("savers")
    check_same_metrics(*folders)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert relative_difference(ours, theirs) < 1e-5


def test_two_ranks_end_early_with_the_best_weights(two_ranks):
    folder, rows = two_ranks / "early", read_metrics(two_ranks / "early")
    losses = {
        r["global_step"]: r["eval_loss"] for r in rows if r["global_step"] and "eval_loss" in r
    }
    best = min(losses, key=losses.get)
    assert max(losses) == best + 1 < 12
    assert undamaged_steps(folder) == [best + 1, best]
    name = "model.safetensors"
    kept = folder / f"checkpoint-{best}"
    assert (folder / name).read_bytes() == (kept / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks, shard_sizes", [(1, [1]), (4, [1, 2, 4])])
def test_any_ranks_do_not_change_the_run(num_ranks, shard_sizes, runs, alone, tmp_path):
    flags = [runs["twelve"] | {"shard_size": size} for size in shard_sizes]
    drive(tmp_path, num_ranks, *(case(tmp_path / str(f["shard_size"]), f) for f in flags))
    for size in shard_sizes:
        check_same_run(tmp_path / str(size), alone("twelve"))


@pytest.mark.slow
def test_compiled_layers_do_not_change_the_run_of_two_ranks(runs, alone, tmp_path):
    flags = {name: runs[name] | {"compile": True} for name in ("twelve", "savers")}
    drive(tmp_path, 2, *(case(tmp_path / name, flags[name]) for name in flags))
    check_same_run(tmp_path / "twelve", alone("twelve"))
    check_same_metrics(tmp_path / "savers", alone("savers"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_two_ranks_do_not_change_the_run_of_other_families(family, data, tiny_folder, tmp_path):
    folder = build_family(family, tiny_folder, tmp_path / "model")
    flags = {"model_name_or_path": folder, "train_data": data["mixed"], "max_steps": 10}
    drive(tmp_path, 2, case(tmp_path / "ranks", flags | {"shard_size": 2}))
    check_same_run(tmp_path / "ranks", train_alone(tmp_path / "alone", flags))
    # Qwen3.5: also what no rank loads.
    files = [load_file(tmp_path / run / "model.safetensors") for run in ("ranks", "alone")]
    assert files[0].keys() == files[1].keys()
    assert "mtp.fc.weight" in files[0] or family != "qwen3_5"


def check_same_run(output_dir, single):
    """The run in `output_dir` is that of one process in `single`: steps, weights, export."""
    check_same_metrics(output_dir, single)
    final = final_weights(output_dir)
    assert relative_difference(final, final_weights(single)) < 1e-5
    # The folder holds the files and settings that one process writes, and the final weights.
    names = {path.name for path in single.iterdir() if path.is_file()}
    assert names <= {path.name for path in output_dir.iterdir()}
    of_the_run = {"config_used.json", "metrics.jsonl", "train.log", "loss.png"}
    for name in names - of_the_run - {"model.safetensors"}:
        assert (output_dir / name).read_text() == (single / name).read_text(), name
    model = AutoModelForImageTextToText.from_pretrained(output_dir)
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, final[name].bfloat16()), name


def check_same_metrics(output_dir, single):
    """Losses to 1e-5, gradient norms to 1e-4, every row once, and what is counted the same."""
    rough = {"loss": 1e-5, "grad_norm": 1e-4, "eval_loss": 1e-5, "eval_character_error_rate": 1e-6}
    exact = {"global_step", "learning_rate", "num_samples", "num_bad_samples", "num_tokens"}
    exact |= {"num_supervised_tokens", "num_bad_eval_samples"}
    for row, other in zip(read_metrics(output_dir), read_metrics(single), strict=True):
        assert set(other) <= set(row)
        for name in rough.keys() & other:
            assert row[name] == pytest.approx(other[name], rel=rough[name])
        for name in exact & set(other):
            assert row[name] == other[name]


def final_weights(output_dir):
    """Return the fp32 weights, by name and whole, in the newest checkpoint of a run."""
    folder = list_checkpoints(output_dir)[0] / "resume"
    weights = {
        name.removeprefix("model."): torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in read_index(folder).state_dict_metadata.items()
        if name.startswith("model.")
    }
    reader, planner = ShardReader(folder), ShardPlanner()
    dcp.load({"model": weights}, storage_reader=reader, planner=planner, no_dist=True)
    return weights


def relative_difference(weights, expected):
    """Return the difference of two models, weights by name, in the norm of the whole model."""
    assert set(weights) == set(expected)
    difference = sum((weights[n] - w).square().sum() for n, w in expected.items()).sqrt()
    return difference / sum(w.square().sum() for w in expected.values()).sqrt()


@pytest.mark.parametrize("name", ["bf16", "bf16-lora", "4bit"])
def test_bf16_follows_one_process(name, two_ranks, alone):
    """Also an adapter on frozen weights in bf16, and in 4 bits."""
    assert losses(two_ranks / name) == pytest.approx(losses(alone(name)), rel=1e-3)


@pytest.mark.slow
def test_bf16_ends_where_one_process_ends(data, tmp_path):
    flags = {"train_data": data["train"], "eval_data": data["held_out"], "eval_steps": 200}
    flags |= {"precision": "bf16", "max_steps": 200, "num_epochs": 100, "learning_rate": 3e-4}
    train_alone(tmp_path / "alone", flags)
    drive(tmp_path, 2, case(tmp_path / "ranks", flags))
    held_out = [
        [row["eval_loss"] for row in read_metrics(tmp_path / name) if "eval_loss" in row]
        for name in ("ranks", "alone")
    ]
    (_, loss), (start_loss, other) = held_out
    assert loss == pytest.approx(other, rel=0.01)
    assert other < 0.7 * start_loss, "nothing was learned"


# ------------------------------------------------------------------ exact resume


@pytest.mark.parametrize("name", ["two-to-two", "one-to-two", "two-to-one"])
def test_two_ranks_and_one_resume_the_run_that_would_have_been(name, two_ranks, runs, alone):
    """In the middle of an epoch: after two ranks, and after one process."""
    if name == "two-to-one":
        copy_checkpoint(two_ranks / "two-to-two", 7, two_ranks / name)
        train_alone(two_ranks / name, runs["twelve"] | LATEST | {"num_workers": 1})
    check_same_run(two_ranks / name, alone("twelve"))
    # It went on from step 7, and did not begin anew.
    assert "resumed    from" in (two_ranks / name / "train.log").read_text()


@pytest.mark.slow
def test_any_number_of_ranks_resumes_at_an_epochs_end(runs, alone, tmp_path):
    """Two ranks to four, sharded by two, in two replicas; four to two; two alone."""
    twelve, end = runs["twelve"], str(EXIT_STOPPED)
    first = twelve | {"shard_size": 1, "save_steps": 8}
    drive(tmp_path, 2, case(tmp_path / "a", first, "stop after 8", end))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    cases = [
        case(tmp_path / "a", twelve | LATEST | {"shard_size": 2}),
        case(tmp_path / "c", twelve | {"shard_size": 4}, "stop after 8", end),
    ]
    drive(tmp_path, 4, *cases)
    drive(tmp_path, 2, *(case(tmp_path / name, twelve | LATEST) for name in "bc"))
    for name in "abc":
        check_same_run(tmp_path / name, alone("twelve"))


# ------------------------------------------------------------------ what ranks hold


def test_a_signal_to_one_rank_ends_the_evaluation_of_both(two_ranks):
    assert undamaged_steps(two_ranks / "evaluation") == [2]
    rows = read_metrics(two_ranks / "evaluation")
    assert [row["global_step"] for row in rows if "eval_loss" in row] == [0]


def test_a_signal_after_the_ranks_have_agreed_counts_in_the_next_step(two_ranks):
    assert undamaged_steps(two_ranks / "late") == [4]
    assert [row["global_step"] for row in read_metrics(two_ranks / "late")] == [1, 2, 3, 4]


def test_an_export_that_fails_on_the_main_process_is_survived_by_all(two_ranks):
    assert undamaged_steps(two_ranks / "full") == [4]
    log = (two_ranks / "full" / "train.log").read_text()
    assert "checkpoint-2 could not be written" in log and "No space left" in log


@pytest.mark.slow  # five runs
def test_two_ranks_train_in_bf16_lean_and_one_goes_on(data, tmp_path):
    flags = {"train_data": data["mixed"], "precision": "bf16_lean", "save_steps": 2}
    flags |= {"num_epochs": 1, "learning_rate": 1e-4}
    shards = [case(tmp_path / f"shard-{size}", flags | {"shard_size": size}) for size in (1, 2)]
    drive(tmp_path, 2, *shards)
    run_script("finetune.py", *argv_of(tmp_path / "alone", flags))
    alone = losses(tmp_path / "alone")
    assert "compiled " not in (tmp_path / "alone" / "train.log").read_text()
    for size in (1, 2):
        # Where weights are rounded is drawn anew by each rank; before the first step, nothing is.
        first, *_, last = losses(tmp_path / f"shard-{size}")
        assert first == pytest.approx(alone[0], rel=1e-3)
        assert last == pytest.approx(alone[-1], rel=0.02)
    # Moments of 8 bits are made for other shards: two ranks' on one, one's on two.
    copy_checkpoint(tmp_path / "shard-2", 2, tmp_path / "two-to-one")
    copy_checkpoint(tmp_path / "alone", 2, tmp_path / "one-to-two")
    run_script("finetune.py", *argv_of(tmp_path / "two-to-one", flags | LATEST))
    drive(tmp_path, 2, case(tmp_path / "one-to-two", flags | LATEST))
    for name in ("two-to-one", "one-to-two"):
        assert [row["global_step"] for row in read_metrics(tmp_path / name)] == [1, 2, 3, 4]
        assert losses(tmp_path / name)[2] == pytest.approx(alone[2], rel=5e-3)


def test_tokens_by_rank_add_up_and_dummy_work_is_told():
    lengths = torch.tensor([50, 40, 30, 20, 10]).numpy()
    index = Index(lengths, lengths // 2, lengths // 5, lengths // 10, *[lengths * 0] * 2)
    plan = Plan(index, 5, 60, 0, world_size=3)
    step = plan.step(0)
    metrics = rank_metrics(plan, step, num_dummy_tokens=5)
    for rank, micro_batches in enumerate(step.micro_batches):
        hand = [i for samples in micro_batches for i in samples]
        image_tokens = sum(lengths[i] // 5 for i in hand)
        video_tokens = sum(lengths[i] // 10 for i in hand)
        total = sum(lengths[i] for i in hand)
        assert metrics["num_image_tokens_by_rank"][rank] == image_tokens
        assert metrics["num_video_tokens_by_rank"][rank] == video_tokens
        assert metrics["num_text_tokens_by_rank"][rank] == total - image_tokens - video_tokens
        dummy = 5 * len(micro_batches)
        assert metrics["dummy_share_by_rank"][rank] == round(dummy / (total + dummy), 4)
    one_sample = Plan(index, 1, 60, 0, world_size=2)
    assert rank_metrics(one_sample, one_sample.step(0), 5)["dummy_share_by_rank"][1] == 1.0


def build_large(tiny_folder, folder) -> int:
    """Write a model of 100 M parameters with tiny's processor, its weights in several files."""
    config = AutoConfig.from_pretrained(tiny_folder)
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
    model.generation_config = GenerationConfig.from_pretrained(tiny_folder)
    model.save_pretrained(folder, max_shard_size="60MB")
    load_processor(tiny_folder, tiny_config()).save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_memory_falls_with_the_shard_size(tiny_folder, data, tmp_path):
    num_parameters = build_large(tiny_folder, tmp_path / "large")
    assert 80e6 < num_parameters < 130e6
    whole = 4 * num_parameters
    flags = {"model_name_or_path": tmp_path / "large", "train_data": data["mixed"]}
    flags |= {"max_steps": 2, "learning_rate": 1e-4}
    alone = train_alone(tmp_path / "alone", flags)
    for size in (1, 2, 4):
        output_dir = tmp_path / str(size)
        drive(tmp_path, 4, case(output_dir, flags | {"shard_size": size}, "memory"))
        # Its embeddings are not tied, so they are sharded otherwise than tiny's.
        check_same_metrics(output_dir, alone)
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


def test_ranks_with_unlike_samples_do_not_hang(two_ranks):
    check_unlike_ranks(two_ranks / "adversarial", 20)


@pytest.mark.slow
def test_200_steps_of_unlike_samples_do_not_hang(data, tmp_path):
    drive(tmp_path, 2, adversarial_case(tmp_path / "out", data, 200))
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


@pytest.mark.parametrize(
    "hook, said",
    [
        # A picture that has changed, below, is an error of one rank too.
        pytest.param("raise", "OutOfMemoryError: rank one ran", marks=pytest.mark.slow),
        ("kill", "Signal 9 (SIGKILL)"),
        ("freeze", "silent for 0.1 minutes"),
    ],
)
def test_one_rank_that_fails_ends_all(hook, said, data, tmp_path):
    run = case(tmp_path / "out", {"train_data": data["mixed"]}, hook)
    root_cause = check_told_once(drive(tmp_path, 2, run, code=1), said, tmp_path / "out")
    assert re.search(r"rank +: 1 |rank 1 \(", root_cause)


def test_a_main_machine_that_hangs_is_noticed_by_the_others(monkeypatch):
    """Ranks hear of each other through its launcher's store, which then does not answer."""

    class Store(dict):
        set = dict.__setitem__

        def clone(self):
            return self

        def multi_get(self, keys):
            if next(asked) > 3:
                threading.Event().wait()
            return [self.get(key, "").encode() for key in keys]

    def end(code):
        ended.set()
        threading.Event().wait()

    asked, told, ended = itertools.count(), [], threading.Event()
    store = Store()
    for name, value in {
        "BEAT_SECONDS": 0.01,
        "SILENT_SECONDS": 0.3,
        "world_size": lambda: 2,
        "record_failure": told.append,
        "end_rank": end,
    }.items():
        monkeypatch.setattr(distributed, name, value)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: None)
    monkeypatch.setattr(distributed.dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setenv("MASTER_ADDR", "first-machine")
    distributed._watch_ranks()
    assert ended.wait(20)
    assert "the launcher on first-machine: silent" in str(told[0])


def test_a_picture_that_changed_on_one_rank_costs_no_step(tmp_path, tiny_folder):
    """All ranks save the steps done, though one alone has read it; --on_bad_sample skip or not."""
    paths = [make_image(tmp_path / f"{i}.png", 90, 90, i) for i in range(12)]
    samples = [[user(image(path), text("?")), assistant("x")] for path in paths]
    data = write_data(tmp_path / "data.json", samples)
    prepared = set_up(tiny_config(train_data=[data], batch_size=4), tiny_folder)  # indexed
    changed = prepared.data.plan.step(2).samples[1]
    make_image(tmp_path / f"{changed}.png", 160, 160)
    flags = {"train_data": data, "batch_size": 4, "num_epochs": 1, "on_bad_sample": "skip"}
    out = tmp_path / "out"
    printed = finish(torchrun(2, "finetune_distributed.py", *argv_of(out, flags)), code=1)
    root_cause = check_told_once(printed, f"sample {changed}: ", out)
    assert "UserError" in root_cause and "its media have changed" in root_cause
    assert undamaged_steps(out) == [2] and not (out / "model.safetensors").exists()


def check_told_once(printed, said, output_dir) -> str:
    """Two ranks have ended soon, and the root cause of it, which is returned, is told once."""
    assert time.time() - (output_dir / "metrics.jsonl").stat().st_mtime < 60
    root_cause = printed[printed.index("Root Cause") :]
    assert said in root_cause and printed.count(said) == 1
    assert "gloo" not in printed and "Connection" not in printed
    return root_cause


def test_without_a_launcher_it_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"\./finetune_distributed\.sh"):
        start_processes(tiny_config(device="cpu"))


# ------------------------------------------------------------------ the launcher


def test_the_launcher_trains_tiny_without_a_gpu(alone, tmp_path):
    out = tmp_path / "out"
    flags = ("--max_steps", 3, "--output_dir", out, "--report_to", "tensorboard")
    printed = finish(start("./finetune_distributed.sh", *flags, **forking()))
    assert printed.count("TINY") == 1 and "ranks      2" in printed
    assert len(read_metrics(out)) == 3 and undamaged_steps(out) == [3]
    names = [path.name for path in out.iterdir() if path.is_file()]
    (events,) = [name for name in names if name.startswith("events.out")]
    others = {path.name for path in alone("twelve").iterdir() if path.is_file()}
    assert {*names} == {*others, events}


def two_machines(launcher, *flags):
    """Start two launchers on one machine, which find each other as two machines would."""
    # Two devices are named, so that accelerate launch is used; the flags choose the CPU.
    devices = {"CUDA_VISIBLE_DEVICES": "0,1" if launcher == "accelerate" else ""}
    environment = {"NUM_MACHINES": "2", "MAIN_PROCESS_PORT": free_port()} | devices
    flags = ["--model_name_or_path", "tiny", "--device", "cpu", *flags]
    return [
        start("./finetune_distributed.sh", *flags, MACHINE_RANK=str(rank), **environment)
        for rank in range(2)
    ]


@pytest.mark.parametrize("is_forked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_saves_and_exits_with_75(is_forked, tmp_path):
    """As queues send it, to the launcher alone; Ctrl-C and SIGHUP are in test_terminals.py."""
    output_dir = tmp_path / "out"
    flags = ("--num_epochs", 500, "--output_dir", output_dir)
    environment = forking() if is_forked else {}
    process = start("./finetune_distributed.sh", *flags, **environment)
    metrics = output_dir / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") > 1, process)
    process.send_signal(signal.SIGTERM)
    printed = finish(process, code=EXIT_STOPPED)
    assert printed.splitlines()[-1].startswith("Stopped by a signal, and saved.")
    assert undamaged_steps(output_dir) == [len(read_metrics(output_dir))]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_train_one_model(launcher, tmp_path):
    out = tmp_path / "out"
    machines = two_machines(launcher, "--max_steps", 4, "--output_dir", out)
    printed = [finish(machine) for machine in machines]
    assert "4: 2 replicas, each over 2" in printed[0] and "step" not in printed[1]
    alone = tmp_path / "alone"
    finish(start("./finetune.sh", "--max_steps", 4, "--output_dir", alone))
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(out)) == 4


@pytest.mark.slow
def test_a_rank_killed_on_one_machine_ends_the_other(tmp_path):
    out = tmp_path / "out"
    machines = two_machines("torchrun", "--num_epochs", 10_000, "--output_dir", out)
    wait_for((out / "metrics.jsonl").exists, machines[1])
    launcher = psutil.Process(machines[1].pid).children()[0]
    launcher.children()[0].kill()
    killed = time.time()
    printed = [finish(machine, code=1) for machine in machines]
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
    finish(start("./finetune_distributed.sh", *ranks, **devices))
    alone = [*flags, "--output_dir", tmp_path / "alone"]
    finish(start(sys.executable, "finetune.py", *alone, **devices))
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
