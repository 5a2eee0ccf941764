"""Checkpoints: exact, checked, refused where they do not fit, and survived where they fail."""

import functools
import itertools
import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

import finetune
from helpers import CPU, read_metrics, set_up, tiny_config, undamaged_steps, weights
from util import checkpoint as saving
from util import logutil, shards, survive
from util.checkpoint import check_same_run, damage, find_checkpoint, list_checkpoints, rewind_files
from util.config import UserError
from util.model import load
from util.model.loss import cross_entropy_sum
from util.optim import parameter_groups
from util.output_dir import open_output_dir
from util.run import EXIT_STOPPED, StopSignal

FLAGS = {"batch_size": 8, "learning_rate": 1e-3, "num_epochs": 5, "num_workers": 0}
WHOLE = {"max_tokens": 10**6}  # one micro-batch a step
FULL = "No space left on device"
APPEND = logutil.MetricsFile.append


def train_in(
    folder, data, tiny, name="out", stop_after=None, checkpoint=None, bad_losses=(), **flags
):
    """Train in this process, in the folder `name` of `folder`: 12 steps, four an epoch.

    stop_after: SIGTERM comes once that step has been logged. bad_losses: micro-batches whose loss
    is infinite, counted from 1.
    """
    saving.logger.propagate = True
    output_dir, num_steps = folder / name, flags.pop("num_steps", 12)
    flags = FLAGS | {"output_dir": str(output_dir), "train_data": [data]} | flags
    run = set_up(tiny_config(**flags), tiny)
    calls, eval_data = itertools.count(1), None
    output_dir.mkdir(exist_ok=True)
    if checkpoint:
        rewind_files(checkpoint)
    if run.config.eval_data:
        eval_data = finetune.prepare_data(run.config.eval_data, run.encoder, run.config)

    def append(file, row):
        APPEND(file, row)
        if row["global_step"] == stop_after and "loss" in row:
            signal.raise_signal(signal.SIGTERM)

    def loss_sum(logits, targets):
        loss = cross_entropy_sum(logits, targets)
        return loss * float("inf") if next(calls) in bad_losses else loss

    arguments = (run.config, run.model, run.processor, run.data, eval_data, num_steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logutil.MetricsFile, "append", append)
        patch.setattr(finetune, "cross_entropy_sum", loss_sum)
        with pytest.raises(SystemExit) if stop_after else nullcontext() as info:
            finetune.train(*arguments, CPU, checkpoint)
    if stop_after:
        is_saved = (output_dir / f"checkpoint-{stop_after}").is_dir()
        assert info.value.code == (EXIT_STOPPED if is_saved else 1)
    run.folder, run.metrics, run.weights = output_dir, read_metrics(output_dir), weights(run.model)
    return run


@pytest.fixture(scope="module")
def held_out(mixed_data, tmp_path_factory):
    """Ten samples, of all kinds."""
    path = tmp_path_factory.mktemp("held_out") / "data.json"
    path.write_text(json.dumps(json.loads(Path(mixed_data).read_text("utf-8"))[:10]))
    return str(path)


@pytest.fixture
def run(mixed_data, small_folder, tmp_path):
    return functools.partial(train_in, tmp_path, mixed_data, small_folder)


@pytest.fixture(scope="module")
def finished(mixed_data, small_folder, tmp_path_factory):
    """A run with checkpoints after steps 3 and 5; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    return train_in(folder, mixed_data, small_folder, num_steps=5, save_steps=3)


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(finished.folder, tmp_path / "saved")


def losses(result):
    names = ("global_step", "loss", "grad_norm", "learning_rate")
    return [[m[name] for name in names] for m in result.metrics if "loss" in m]


def evaluations(result):
    return [(m["global_step"], m["eval_loss"]) for m in result.metrics if "eval_loss" in m]


def test_a_resumed_run_is_the_run_that_would_have_been(run, monkeypatch):
    """To the last bit; stopped in the middle of an epoch and at its end."""
    straight = run("straight")
    for stop_after, num_workers, file_bytes in ((7, 0, 2**20), (8, 2, 2**30)):
        # What is copied from a GPU is in main memory until its file is closed: there are several.
        monkeypatch.setattr(shards, "SHARD_FILE_BYTES", file_bytes)
        stopped = run("broken", stop_after=stop_after, num_workers=num_workers)
        assert len(stopped.metrics) == stop_after
        checkpoint = stopped.folder / f"checkpoint-{stop_after}"
        sizes = [path.stat().st_size for path in checkpoint.glob("resume/*.distcp")]
        assert len(sizes) == 1 or (len(sizes) >= 5 and max(sizes) < 2 * 2**20)
        assert (len(sizes) == 1) == (file_bytes == 2**30)
        resumed = run("broken", checkpoint=checkpoint, num_workers=num_workers)
        assert losses(resumed) == losses(straight)
        assert torch.equal(resumed.weights, straight.weights)
        shutil.rmtree(stopped.folder)


def test_a_resumed_run_in_bf16_lean_is_so_too(run):
    flags = {"precision": "bf16_lean", "num_steps": 6}
    torch.manual_seed(0)
    straight = run("straight", **flags)
    torch.manual_seed(0)
    stopped = run("broken", stop_after=3, **flags)
    resumed = run("broken", checkpoint=stopped.folder / "checkpoint-3", **flags)
    assert losses(resumed) == losses(straight)
    assert torch.equal(resumed.weights, straight.weights)


def test_a_checkpoint_is_a_model_folder(saved):
    folder = saved / "checkpoint-3"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(folder).tokenizer.padding_side == "left"
    assert '"batch_size": 8' in (folder / "config_used.json").read_text()
    state = saving._read_state(folder)
    assert state["global_step"] == 3 and state["versions"]["torch"] in torch.__version__
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    assert "checkpoint-3" not in (folder / "resume" / "index.json").read_text()


def write_state(checkpoint, **changes):
    """Change the state of a checkpoint, and its checksum, as somebody who means harm would."""
    state = saving._read_state(checkpoint) | changes
    text = json.dumps({"state": state, "sha256": saving._digest(state)})
    (checkpoint / saving.STATE_FILE).write_text(text)


def test_the_newest_and_the_best_are_kept(run, held_out):
    # Held-out loss rises from the third step on: the learning rate is far too high by then.
    flags = {"save_steps": 1, "eval_steps": 1, "keep_checkpoints": 1, "num_steps": 6}
    result = run(eval_data=[held_out], warmup_ratio=1.0, learning_rate=0.5, **flags)
    evaluated = dict(evaluations(result))
    assert sorted(evaluated) == list(range(7))
    del evaluated[0]
    best = min(evaluated, key=evaluated.get)
    assert best < 6, evaluated
    assert undamaged_steps(result.folder) == [6, best]


def test_the_best_is_the_best_on_the_same_data_and_a_number(run, held_out):
    flags = {"save_steps": 1, "eval_steps": 2, "keep_checkpoints": 9, "num_steps": 5}
    result = run(eval_data=[held_out], **flags)
    evaluated = dict(evaluations(result))
    assert sorted(evaluated) == [0, 2, 4, 5]
    checkpoints = [result.folder / f"checkpoint-{step}" for step in range(1, 6)]
    for step, checkpoint in enumerate(checkpoints, 1):  # that of its own weights, or none
        assert saving._read_state(checkpoint)["eval_loss"] == evaluated.get(step)
    for checkpoint, loss in zip(checkpoints, (0.1, float("nan"), 0.5, 0.9, None)):
        write_state(checkpoint, eval_loss=loss)
    others = saving._read_state(checkpoints[0])["config"] | {"eval_data": ["other.json"]}
    write_state(checkpoints[0], config=others)
    saving._prune(result.folder, tiny_config(keep_checkpoints=1, eval_data=[held_out]))
    assert undamaged_steps(result.folder) == [5, 3]


def test_early_stopping_ends_a_run_with_its_best_weights(run, held_out, caplog):
    flags = {"early_stopping": 2, "eval_steps": 1, "keep_checkpoints": 1, "eval_data": [held_out]}
    flags |= {"warmup_ratio": 1.0, "learning_rate": 0.5}  # too high after some steps
    caplog.set_level("INFO", saving.logger.name)
    straight = run("straight", **flags)
    evaluated = dict(evaluations(straight)[1:])
    best = min(evaluated, key=evaluated.get)
    last = best + 2
    assert list(evaluated) == list(range(1, last + 1)) and last < 12
    assert f"not fallen since step {best}" in caplog.text
    # A signal costs the evaluation of its step, which the resumed run makes up for. One that was
    # at its end has nothing to do.
    for name, stop_after in (("best", best), ("worse", best + 1), ("straight", None)):
        if stop_after:
            run(name, stop_after=stop_after, **flags)
        checkpoint = straight.folder.with_name(name) / f"checkpoint-{stop_after or last}"
        resumed = run(name, checkpoint=checkpoint, **flags)
        assert losses(resumed) == losses(straight)
        assert evaluations(resumed) == evaluations(straight)
        assert undamaged_steps(resumed.folder) == [last, best]
    saving.finish_run(straight.model, None, straight.config, 0)
    kept, written = straight.folder / f"checkpoint-{best}", straight.folder / "model.safetensors"
    assert written.read_bytes() == (kept / written.name).read_bytes()
    assert written.read_bytes() != (checkpoint / written.name).read_bytes()
    assert not (straight.folder / "resume").exists() and f"{kept}, held-out loss" in caplog.text
    assert AutoProcessor.from_pretrained(straight.folder)


def test_a_checkpoint_that_cannot_be_deleted_is_told_and_survived(run, monkeypatch, caplog):
    rmtree = shutil.rmtree

    def busy(path, *args, **options):
        if path.name.endswith(".removed"):
            raise OSError(16, "Device or resource busy")
        rmtree(path, *args, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", busy)
    result = run(save_steps=1, keep_checkpoints=2, num_steps=4)
    assert undamaged_steps(result.folder) == [4, 3]
    assert "checkpoint-1 could not be deleted" in caplog.text
    assert "could not be written" not in caplog.text


def test_evaluation_does_not_change_the_training(run, held_out, tmp_path):
    (tmp_path / "own.py").write_text("def length(answer, reference):\n    return 1 + len(answer)\n")
    plain = run("plain", num_steps=5)
    flags = {"eval_generate": 3, "metric": f"{tmp_path}/own.py:length", "eval_steps": 2}
    flags |= {"num_steps": 5, "eval_data": [held_out]}
    evaluated = run("evaluated", **flags)
    assert losses(plain) == losses(evaluated)
    assert torch.equal(plain.weights, evaluated.weights)
    held_out = evaluations(evaluated)
    assert [step for step, _ in held_out] == [0, 2, 4, 5] and held_out[-1][1] < held_out[0][1]
    scored = [m for m in evaluated.metrics if "eval_exact_match" in m]
    assert len(scored) == 4
    assert all(m["eval_character_error_rate"] > 0 and m["eval_metric"] > 0 for m in scored)
    # One that a signal has skipped is made up for.
    stopped = run("broken", stop_after=4, **flags)
    assert [step for step, _ in evaluations(stopped)] == [0, 2]
    resumed = run("broken", checkpoint=stopped.folder / "checkpoint-4", **flags)
    assert evaluations(resumed) == held_out


def test_a_signal_ends_an_evaluation_at_once(run, held_out, monkeypatch):
    """Between micro-batches and between batches of answers; the resumed run makes up for it."""
    agree, calls, last = StopSignal.agree, [], 10**9

    def agree_and_count(stop):
        if not torch.is_grad_enabled():  # in an evaluation
            calls.append(stop)
            if len(calls) == last:
                signal.raise_signal(signal.SIGTERM)
        agree(stop)

    monkeypatch.setattr(StopSignal, "agree", agree_and_count)
    flags = {"eval_data": [held_out], "eval_steps": 2, "eval_generate": 9, "num_steps": 3}
    straight = run("straight", **flags)  # evaluated before the first, after steps 2 and 3
    num_calls = len(calls) // 3
    assert num_calls > 2
    for last in (num_calls + 1, 2 * num_calls):
        calls.clear()
        with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
            run(str(last), **flags)
        assert len(calls) == last
        checkpoint = straight.folder.with_name(str(last)) / "checkpoint-2"
        resumed = run(str(last), checkpoint=checkpoint, **flags)
        rows = [[m for m in r.metrics if "eval_loss" in m] for r in (straight, resumed)]
        assert rows[0] == rows[1] and len(rows[0]) == 3


def test_an_evaluation_that_fails_costs_no_step(run, held_out, tmp_path):
    """A judge that cannot be reached at the very end, say."""
    (tmp_path / "judge.py").write_text(
        "asked = []\ndef score(answer, reference):\n"
        "    assert asked.append(reference) or len(asked) <= 2\n"
        "    return 1\n"
    )
    flags = {"eval_data": [held_out], "eval_generate": 2, "eval_steps": 9, "num_steps": 3}
    with pytest.raises(UserError, match="judge.py:score: AssertionError"):
        run(metric=f"{tmp_path}/judge.py:score", **flags)
    assert undamaged_steps(tmp_path / "out") == [3]


VICTIMS = {
    "state": "resume/state.json",
    "shards": "resume/__0_0.distcp",
    "index": "resume/index.json",
}


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", *VICTIMS])
def test_damage_is_named_and_latest_goes_back(saved, fault, caplog):
    assert undamaged_steps(saved) == [5, 3]
    newest, older = list_checkpoints(saved)
    victim = newest / VICTIMS.get(fault, "model.safetensors")
    content = bytearray(victim.read_bytes())
    if fault == "truncated":
        victim.write_bytes(content[:-100])
    elif fault == "missing":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    assert victim.name in damage(newest)
    latest = tiny_config(output_dir=str(saved), resume_from="latest")
    assert find_checkpoint(latest) == older
    assert f"{newest} is damaged" in caplog.text and victim.name in caplog.text
    with pytest.raises(UserError, match=victim.name):
        find_checkpoint(tiny_config(resume_from=str(newest)))
    shutil.rmtree(older)
    with pytest.raises(UserError, match="no usable checkpoint"):
        find_checkpoint(latest)


def test_checkpoints_after_the_one_resumed_are_not_of_the_run_any_more(run, caplog):
    """Or they would win over those of the run that goes on, also where they are damaged."""
    stopped = run(stop_after=6, save_steps=3, num_steps=9)
    damaged = stopped.folder / "checkpoint-6" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    latest = tiny_config(output_dir=str(stopped.folder), resume_from="latest")
    checkpoint = find_checkpoint(latest)
    assert checkpoint.name == "checkpoint-3"
    resumed = run(checkpoint=checkpoint, stop_after=5, keep_checkpoints=1, num_steps=9)
    assert [m["global_step"] for m in resumed.metrics] == [1, 2, 3, 4, 5]
    assert "it is abandoned-checkpoint-6 now" in caplog.text
    assert find_checkpoint(latest).name == "checkpoint-5"
    assert (stopped.folder / "abandoned-checkpoint-6").is_dir()
    # It was given up; and giving up another one in its place does not delete it.
    with pytest.raises(UserError, match="a folder checkpoint-STEP"):
        find_checkpoint(tiny_config(resume_from=str(stopped.folder / "abandoned-checkpoint-6")))
    shutil.copytree(stopped.folder / "checkpoint-5", stopped.folder / "checkpoint-6")
    rewind_files(stopped.folder / "checkpoint-5")
    names = {path.name for path in stopped.folder.glob("abandoned-*")}
    assert names == {"abandoned-checkpoint-6", "abandoned-checkpoint-6-2"}


def test_a_finished_run_goes_on_where_it_ended(run, saved):
    """With more epochs; the last step is saved whatever --save_steps says."""
    longer = run("saved", checkpoint=saved / "checkpoint-5", num_steps=7)
    assert [m["global_step"] for m in longer.metrics] == list(range(1, 8))
    assert undamaged_steps(saved) == [7, 5]


def test_other_samples_left_out_make_another_run(mixed_data, small_folder):
    def digest(max_tokens):
        flags = {"train_data": [mixed_data], "on_bad_sample": "skip", "max_tokens": max_tokens}
        return set_up(tiny_config(**flags), small_folder).data.digest

    assert digest(2000) == digest(3000) != digest(100)


def test_a_full_disk_at_the_very_end_names_the_checkpoint(monkeypatch, tmp_path):
    """It is a model folder too, so there is nothing to wait for."""
    monkeypatch.setattr(saving, "export_model", Mock(side_effect=OSError(28, FULL)))
    with pytest.raises(UserError, match=f"{FULL}.*newest checkpoint in that folder is a mod"):
        saving.finish_run(torch.nn.Linear(1, 1), None, tiny_config(output_dir=str(tmp_path)), 0.0)


def test_another_run_is_refused_and_every_difference_named(finished, mixed_data, caplog):
    checkpoint, digest = finished.folder / "checkpoint-3", finished.data.digest
    flags = FLAGS | {"output_dir": str(finished.folder), "train_data": [mixed_data]}
    fine = tiny_config(**flags | {"num_epochs": 9, "max_tokens": 99, "num_workers": 7})
    check_same_run(checkpoint, fine, digest, 36)
    assert "--num_epochs: was 5, is 9: the learning rate follows" in caplog.text
    with pytest.raises(UserError, match="has done more than the 1 steps"):
        check_same_run(checkpoint, fine, digest, 1)
    other = tiny_config(**flags | {"learning_rate": 0.5, "seed": 3})
    with pytest.raises(UserError) as info:
        check_same_run(checkpoint, other, "another digest", 1)
    changed = ("--learning_rate: was 0.001, is 0.5", "--seed: was 0, is 3", "the data have changed")
    assert all(words in str(info.value) for words in (*changed, "new run"))
    assert "batch_size" not in str(info.value)


def test_output_folders_that_do_not_fit(finished, tmp_path):
    with pytest.raises(UserError, match="--resume_from latest"):
        open_output_dir(finished.config, CPU, None)
    elsewhere = tiny_config(output_dir=str(tmp_path / "other"))
    with pytest.raises(UserError, match="its own folder"):
        open_output_dir(elsewhere, CPU, finished.folder / "checkpoint-3")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        open_output_dir(tiny_config(output_dir=str(tmp_path / "file" / "out")), CPU, None)
    with pytest.raises(UserError, match="no usable checkpoint"):
        find_checkpoint(tiny_config(output_dir=str(tmp_path / "other"), resume_from="latest"))


@pytest.mark.parametrize(
    "module, name, fault, said",
    [
        (saving.shutil, "disk_usage", [SimpleNamespace(free=1000)], "GiB are free"),
        (load, "_write_model", SafetensorError(f"I/O error: {FULL} (os error 28)"), FULL),
        (shards.ShardWriter, "_write_data", OSError(28, FULL), FULL),
    ],
    ids=["before", "export", "shards"],
)
def test_a_full_disk_is_told_survived_and_tried_again(
    run, module, name, fault, said, monkeypatch, caplog, tmp_path
):
    def be_full_at_save(number):
        original, calls = getattr(module, name), itertools.count(1)
        full = Mock(side_effect=fault)

        def write(*args):
            return (full if next(calls) == number else original)(*args)

        monkeypatch.setattr(module, name, write)

    be_full_at_save(2)
    result = run(save_steps=2, num_steps=6)
    assert undamaged_steps(result.folder) == [6, 2]
    assert "checkpoint-4 could not be written" in caplog.text and said in caplog.text
    assert not list(result.folder.glob(".*"))
    # After a signal, nobody may think that the steps are saved.
    be_full_at_save(1)
    run("stopped", stop_after=3)
    assert "stopped after step 3, which is NOT saved" in caplog.text
    assert "go on with" not in caplog.text and not list_checkpoints(tmp_path / "stopped")


@pytest.mark.parametrize("is_lost", [True, False])
def test_the_end_of_a_run_gives_a_full_disk_one_more_chance(run, monkeypatch, tmp_path, is_lost):
    """What is lost then, of metrics and the last checkpoint, is an error that names it."""
    write, start_writing, train = logutil.MetricsFile._write, saving._start_writing, finetune.train
    full, lost = [True], []
    monkeypatch.setattr(logutil.MetricsFile, "_write", lambda file: None if full else write(file))

    def start(*args):
        if full:
            raise OSError(28, FULL)
        start_writing(*args)

    monkeypatch.setattr(saving, "_start_writing", start)
    sleep = (lambda _: None) if is_lost else (lambda _: full.clear())
    monkeypatch.setattr(logutil.time, "sleep", sleep)
    monkeypatch.setattr(finetune, "train", lambda *args: lost.extend(train(*args)))
    with pytest.raises(FileNotFoundError) if is_lost else nullcontext():  # of train_in's reading
        assert len(run(num_steps=2).metrics) == 2
    assert lost == (["2 lines of metrics.jsonl", "checkpoint-2"] if is_lost else [])
    assert list_checkpoints(tmp_path / "out") == [tmp_path / "out" / "checkpoint-2"][is_lost:]
    monkeypatch.setattr(saving, "_export", Mock())
    with pytest.raises(UserError, match="has refused a and b: lost"):
        saving.finish_run(None, None, tiny_config(output_dir=str(tmp_path)), 0.0, ["a", "b"])


@pytest.mark.parametrize("fate", ["deleted", "made anew", "another run's"])
def test_an_output_folder_that_is_lost_in_mid_run(run, monkeypatch, tmp_path, fate):
    """All that is left goes into a new one, and nothing into another run's."""
    out, lost, train = tmp_path / "out", [], finetune.train

    class Vanishing(StopSignal):
        def __init__(self):
            super().__init__()
            survive.claim(out)
            shutil.rmtree(out)
            if fate != "deleted":
                out.mkdir()
            if fate == "another run's":
                (out / "metrics.jsonl").write_text("{}\n")

    monkeypatch.setattr(survive, "_claims", {})
    monkeypatch.setattr(finetune, "StopSignal", Vanishing)
    monkeypatch.setattr(finetune, "train", lambda *args: lost.extend(train(*args)))
    monkeypatch.setattr(logutil, "LAST_CHANCE_SECONDS", 0)
    result = run(num_steps=3, save_steps=1)
    if fate == "another run's":
        assert lost == ["3 lines of metrics.jsonl", "checkpoint-3"]
        assert [path.name for path in out.iterdir()] == ["metrics.jsonl"] and result.metrics == [{}]
        with pytest.raises(UserError, match="is another folder by now"):
            saving.finish_run(result.model, result.processor, result.config, 0.0, lost)
    else:
        assert not lost and [row["global_step"] for row in result.metrics] == [1, 2, 3]
        assert undamaged_steps(out)[0] == 3


def test_metrics_wait_for_a_folder_that_comes_back(tmp_path):
    waiting = logutil.MetricsFile(tmp_path / "gone" / "metrics.jsonl")
    waiting.append({"global_step": 1})
    (tmp_path / "gone").mkdir()
    waiting.append({"global_step": 2})
    assert [row["global_step"] for row in read_metrics(tmp_path / "gone")] == [1, 2]


@pytest.mark.parametrize("save_steps", [3, 100])
def test_a_bad_step_stops_with_the_last_good_state(run, save_steps, monkeypatch, tmp_path):
    """What is saved already is not written again; before the first step, there is nothing."""
    flags = WHOLE | {"num_steps": 6, "save_steps": save_steps}
    with pytest.raises(UserError, match="step 1: loss inf"):
        run("first", bad_losses={1}, **flags)
    assert not list_checkpoints(tmp_path / "first")
    rename = Mock(side_effect=os.rename)
    monkeypatch.setattr(saving.os, "rename", rename)
    with pytest.raises(UserError, match="step 4: loss inf.*Samples of this step"):
        run(bad_losses={4}, **flags)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert [call.args[1] for call in rename.call_args_list].count(checkpoint) == 1
    assert undamaged_steps(tmp_path / "out") == [3]
    resumed = run(checkpoint=checkpoint, **flags)
    assert torch.equal(resumed.weights, run("straight", **flags).weights)


def test_steps_that_changed_nothing_are_saved_and_resumed_exactly(run):
    """torch would make AdamW's state up by a step of its own, which AdamW then counts."""
    flags = WHOLE | {"skip_bad_steps": 1, "num_steps": 4, "keep_checkpoints": 9}
    often, never = (
        run(str(save_steps), save_steps=save_steps, bad_losses={1}, **flags)
        for save_steps in (1, 100)
    )
    assert torch.equal(often.weights, never.weights)
    first = often.folder / "checkpoint-1"
    assert damage(first) is None
    assert torch.equal(run("1", checkpoint=first, **flags).weights, often.weights)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_another_optimizer_is_saved_and_resumed(run, monkeypatch, momentum):
    """Plain SGD has no state at all: whether there is anything to save depends on steps done."""

    def sgd(model, config):
        return torch.optim.SGD(parameter_groups(model, config), lr=0.0, momentum=momentum)

    monkeypatch.setattr(finetune, "build_optimizer", sgd)
    straight = run("straight", num_steps=6)
    stopped = run("broken", num_steps=6, stop_after=3)
    resumed = run("broken", num_steps=6, checkpoint=stopped.folder / "checkpoint-3")
    assert losses(resumed) == losses(straight)
    assert torch.equal(resumed.weights, straight.weights)


def test_bad_steps_can_be_skipped_but_not_too_many_in_a_row(run):
    flags = WHOLE | {"skip_bad_steps": 2, "num_steps": 7}
    result = run(bad_losses={2, 3, 6}, **flags)
    assert [m["global_step"] for m in result.metrics if m["loss"] is None] == [2, 3, 6]
    assert torch.isfinite(result.weights).all()
    with pytest.raises(UserError, match="step 4"):
        run("again", bad_losses={2, 3, 4}, **flags)
