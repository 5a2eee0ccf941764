"""Checkpoints: exact, checked, refused where they do not fit, and survived where they fail."""

import json
import os
import pickle
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, set_up, tiny_config
from safetensors import SafetensorError
from test_one_rule import weights
from transformers import AutoModelForImageTextToText, AutoProcessor

import finetune
from util import checkpoint as saving
from util import logutil
from util.checkpoint import (
    check_same_run,
    damage,
    find_checkpoint,
    list_checkpoints,
    make_output_dir,
    rewind_files,
)
from util.config import UserError
from util.model import load
from util.model.loss import cross_entropy_sum
from util.run import EXIT_STOPPED, StopSignal

FLAGS = {"batch_size": 8, "learning_rate": 1e-3, "num_epochs": 5, "num_workers": 0}
NUM_STEPS = 20  # four an epoch


@pytest.fixture(autouse=True)
def restored_signals():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(mixed_data, tiny_folder, tmp_path, monkeypatch):
    """Train in this process; `stop_after` sends SIGTERM once that step has been logged."""

    def train(
        name="out",
        stop_after=None,
        checkpoint=None,
        num_steps=NUM_STEPS,
        exit_code=EXIT_STOPPED,
        **flags,
    ):
        flags = FLAGS | {"output_dir": str(tmp_path / name), "train_data": [mixed_data]} | flags
        prepared = set_up(tiny_config(**flags), tiny_folder)
        (tmp_path / name).mkdir(exist_ok=True)
        if checkpoint:
            rewind_files(checkpoint)
        eval_data = None
        if flags.get("eval_data"):
            eval_data = finetune.prepare_data(
                flags["eval_data"], prepared.encoder, prepared.config, world_size=1
            )

        class MetricsFile(logutil.MetricsFile):
            def append(self, row):
                super().append(row)
                if row["global_step"] == stop_after and "loss" in row:
                    signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(finetune, "MetricsFile", MetricsFile)
        arguments = (prepared.config, prepared.model, prepared.processor, prepared.data)
        if stop_after:
            with pytest.raises(SystemExit) as info:
                finetune.train(*arguments, eval_data, num_steps, CPU, checkpoint)
            assert info.value.code == exit_code
        else:
            finetune.train(*arguments, eval_data, num_steps, CPU, checkpoint)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return SimpleNamespace(
            metrics=[json.loads(line) for line in lines],
            weights=weights(prepared.model),
            config=prepared.config,
            data=prepared.data,
            folder=tmp_path / name,
        )

    return train


def losses(result):
    return [
        (m["global_step"], m["loss"], m["grad_norm"], m["learning_rate"])
        for m in result.metrics
        if "loss" in m
    ]


@pytest.mark.parametrize("stop_after, num_workers", [(7, 0), (8, 2)])
def test_a_resumed_run_is_the_run_that_would_have_been(run, stop_after, num_workers):
    """To the last bit; stopped in the middle of an epoch and at its end."""
    straight = run("straight")
    stopped = run("broken", stop_after=stop_after, num_workers=num_workers)
    assert len(stopped.metrics) == stop_after
    checkpoint = stopped.folder / f"checkpoint-{stop_after}"
    resumed = run("broken", checkpoint=checkpoint, num_workers=num_workers)
    assert losses(resumed) == losses(straight)
    assert torch.equal(resumed.weights, straight.weights)


def test_resume_drops_the_steps_after_the_checkpoint(run):
    stopped = run(stop_after=6, save_steps=4)
    assert [p.name for p in list_checkpoints(stopped.folder)] == ["checkpoint-6", "checkpoint-4"]
    resumed = run(checkpoint=stopped.folder / "checkpoint-4", num_steps=8)
    assert [m["global_step"] for m in resumed.metrics] == list(range(1, 9))


def test_a_checkpoint_is_a_model_folder(run):
    folder = run(stop_after=2).folder / "checkpoint-2"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(folder).tokenizer.padding_side == "left"
    assert json.loads((folder / "config_used.json").read_text())["batch_size"] == 8
    state = json.loads((folder / "resume" / "state.json").read_text())["state"]
    assert state["global_step"] == 2 and state["versions"]["torch"] in torch.__version__
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    # A path is pickled otherwise by Python 3.13, and nobody else has to know it.
    metadata = (folder / "resume" / ".metadata").read_bytes()
    assert b"pathlib" not in metadata and str(folder.parent).encode() not in metadata


def test_the_newest_and_the_best_are_kept(run, mixed_data):
    folder = run(save_steps=1, keep_checkpoints=2, num_steps=6).folder
    assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-6", "checkpoint-5"]
    # Held-out loss rises from the third step on: the learning rate is far too high by then.
    flags = {"save_steps": 1, "eval_steps": 1, "keep_checkpoints": 1, "num_steps": 6}
    result = run("evaluated", eval_data=[mixed_data], warmup_ratio=1.0, learning_rate=0.5, **flags)
    evaluated = {m["global_step"]: m["eval_loss"] for m in result.metrics if "eval_loss" in m}
    assert sorted(evaluated) == list(range(7))
    del evaluated[0]
    best = min(evaluated, key=evaluated.get)
    assert best < 6, evaluated
    assert {p.name for p in list_checkpoints(result.folder)} == {
        f"checkpoint-{best}",
        "checkpoint-6",
    }


def test_the_best_is_the_best_on_the_same_data_and_a_number(run):
    result = run(save_steps=1, keep_checkpoints=9, num_steps=5)
    others = {"eval_data": ["other.json"]}
    for step, loss, config in (
        (1, 0.1, others),
        (2, float("nan"), {}),
        (3, 0.5, {}),
        (4, 0.9, {}),
        (5, None, {}),
    ):
        path = result.folder / f"checkpoint-{step}" / "resume" / "state.json"
        state = json.loads(path.read_text())["state"]
        state |= {"eval_loss": loss, "config": state["config"] | config}
        path.write_text(json.dumps({"state": state, "sha256": saving._digest(state)}))
    saving._prune(result.folder, tiny_config(keep_checkpoints=1))
    assert [p.name for p in list_checkpoints(result.folder)] == ["checkpoint-5", "checkpoint-3"]


def test_a_checkpoint_that_cannot_be_deleted_is_told_and_survived(run, monkeypatch, caplog):
    saving.logger.propagate = True
    rmtree = shutil.rmtree

    def busy(path, *args, **options):
        if path.name.endswith(".removed"):
            raise OSError(16, "Device or resource busy")
        rmtree(path, *args, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", busy)
    result = run(save_steps=1, keep_checkpoints=1, num_steps=3)
    assert [p.name for p in list_checkpoints(result.folder)] == ["checkpoint-3"]
    assert "checkpoint-1 could not be deleted" in caplog.text
    assert "could not be written" not in caplog.text


def test_evaluation_does_not_change_the_training(run, mixed_data, tmp_path):
    (tmp_path / "own.py").write_text("def length(answer, reference):\n    return 1 + len(answer)\n")
    plain = run("plain", num_steps=5)
    flags = {"eval_generate": 3, "metric": f"{tmp_path}/own.py:length", "eval_steps": 2}
    evaluated = run("evaluated", num_steps=5, eval_data=[mixed_data], **flags)
    assert losses(plain) == losses(evaluated)
    assert torch.equal(plain.weights, evaluated.weights)
    eval_losses = [m["eval_loss"] for m in evaluated.metrics if "eval_loss" in m]
    assert len(eval_losses) == 4 and eval_losses[-1] < eval_losses[0]
    scored = [m for m in evaluated.metrics if "eval_exact_match" in m]
    assert len(scored) == 4
    assert all(m["eval_character_error_rate"] > 0 and m["eval_metric"] > 0 for m in scored)


def test_a_checkpoint_has_the_held_out_loss_of_its_own_weights_or_none(run, mixed_data):
    flags = {"save_steps": 1, "eval_steps": 2, "keep_checkpoints": 9, "num_steps": 5}
    result = run(eval_data=[mixed_data], **flags)
    evaluated = {m["global_step"]: m["eval_loss"] for m in result.metrics if "eval_loss" in m}
    assert sorted(evaluated) == [0, 2, 4, 5]
    for step in range(1, 6):
        state = json.loads((result.folder / f"checkpoint-{step}/resume/state.json").read_text())
        assert state["state"]["eval_loss"] == evaluated.get(step)


def test_an_evaluation_that_a_signal_has_skipped_is_made_up_for(run, mixed_data):
    flags = {"eval_data": [mixed_data], "eval_steps": 2, "num_steps": 5}
    straight = run("straight", **flags)
    stopped = run("broken", stop_after=4, **flags)
    assert [m["global_step"] for m in stopped.metrics if "eval_loss" in m] == [0, 2]
    resumed = run("broken", checkpoint=stopped.folder / "checkpoint-4", **flags)
    expected, got = (
        [(m["global_step"], m["eval_loss"]) for m in result.metrics if "eval_loss" in m]
        for result in (straight, resumed)
    )
    assert got == expected and [step for step, _ in got] == [0, 2, 4, 5]


def test_an_evaluation_that_fails_costs_no_step(run, mixed_data, tmp_path):
    """A judge that cannot be reached at the very end, say."""
    (tmp_path / "judge.py").write_text(
        "asked = []\ndef score(answer, reference):\n"
        "    assert asked.append(reference) or len(asked) <= 2\n"
        "    return 1\n"
    )
    flags = {"eval_data": [mixed_data], "eval_generate": 2, "eval_steps": 9, "num_steps": 3}
    with pytest.raises(UserError, match="judge.py:score: AssertionError"):
        run(metric=f"{tmp_path}/judge.py:score", **flags)
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    assert checkpoint.name == "checkpoint-3" and damage(checkpoint) is None


class Opens:
    """Pickled, it calls open() as it is loaded."""

    def __reduce__(self):
        return open, ("opened", "w")


def test_metadata_that_could_run_code_are_not_loaded(run, monkeypatch, tmp_path):
    folder = run(stop_after=2).folder / "checkpoint-2"
    path = folder / "resume" / ".metadata"
    path.write_bytes(pickle.dumps(Opens()))
    # Somebody who means harm writes the checksum of it, too.
    content = json.loads((folder / "resume" / "state.json").read_text())
    state = content["state"]
    state["files"]["resume/.metadata"] = [path.stat().st_size, saving._checksum(path)]
    text = json.dumps({"state": state, "sha256": saving._digest(state)})
    (folder / "resume" / "state.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert "it asks for" in damage(folder) and not (tmp_path / "opened").exists()


VICTIMS = {
    "state": "resume/state.json",
    "shards": "resume/__0_0.distcp",
    "metadata": "resume/.metadata",
}


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", *VICTIMS])
def test_damage_is_named_and_latest_goes_back(run, fault, caplog):
    result = run(stop_after=4, save_steps=2)
    newest, older = list_checkpoints(result.folder)
    assert damage(newest) is None and damage(older) is None
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
    saving.logger.propagate = True
    latest = tiny_config(output_dir=str(result.folder), resume_from="latest")
    assert find_checkpoint(latest) == older
    assert f"{newest} is damaged" in caplog.text and victim.name in caplog.text
    with pytest.raises(UserError, match=victim.name):
        find_checkpoint(tiny_config(resume_from=str(newest)))
    shutil.rmtree(older)
    with pytest.raises(UserError, match="no usable checkpoint"):
        find_checkpoint(latest)


def test_checkpoints_after_the_one_resumed_are_not_of_the_run_any_more(run, caplog):
    """Or they would win over those of the run that goes on, also where they are damaged."""
    saving.logger.propagate = True
    stopped = run(stop_after=6, save_steps=3, num_steps=9)
    damaged = stopped.folder / "checkpoint-6" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    latest = tiny_config(output_dir=str(stopped.folder), resume_from="latest")
    checkpoint = find_checkpoint(latest)
    assert checkpoint.name == "checkpoint-3"
    run(checkpoint=checkpoint, stop_after=5, keep_checkpoints=1, num_steps=9)
    assert "it is abandoned-checkpoint-6 now" in caplog.text
    assert find_checkpoint(latest).name == "checkpoint-5"
    assert (stopped.folder / "abandoned-checkpoint-6").is_dir()
    # It was given up; and giving up another one in its place does not delete it.
    with pytest.raises(UserError, match="a folder checkpoint-STEP"):
        find_checkpoint(tiny_config(resume_from=str(stopped.folder / "abandoned-checkpoint-6")))
    shutil.copytree(stopped.folder / "checkpoint-5", stopped.folder / "checkpoint-6")
    rewind_files(stopped.folder / "checkpoint-5")
    names = {path.name for path in stopped.folder.glob("abandoned-*")}
    assert names == {"abandoned-checkpoint-6", "abandoned-checkpoint-6-again"}


def test_a_finished_run_goes_on_where_it_ended(run):
    """With more epochs; the last step is saved whatever --save_steps says."""
    finished = run(num_steps=6)
    (checkpoint,) = list_checkpoints(finished.folder)
    assert checkpoint.name == "checkpoint-6"
    longer = run(checkpoint=checkpoint, num_steps=8)
    assert [m["global_step"] for m in longer.metrics] == list(range(1, 9))


def test_other_samples_left_out_make_another_run(mixed_data, tiny_folder):
    def digest(max_tokens):
        flags = {"train_data": [mixed_data], "on_bad_sample": "skip", "max_tokens": max_tokens}
        return set_up(tiny_config(**flags), tiny_folder).data.digest

    assert digest(2000) == digest(3000) != digest(100)


def test_the_last_export_waits_for_room(monkeypatch, caplog, tmp_path):
    saving.logger.propagate = True
    monkeypatch.setattr(saving, "EXPORT_AGAIN_SECONDS", 0)
    tries = []

    def export(folder):
        tries.append(folder)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")

    saving.export_at_last(export, tmp_path, 7)
    assert tries == [tmp_path] * 3 and caplog.text.count("Make room: trying again") == 2
    # A signal ends the waiting; a run whose last step is saved can go on.
    monkeypatch.setattr(saving, "EXPORT_AGAIN_SECONDS", 60)
    monkeypatch.setattr(StopSignal, "was_noted", True)
    for code in (1, EXIT_STOPPED):
        tries.clear()
        with pytest.raises(SystemExit) as info:
            saving.export_at_last(export, tmp_path, 7)
        assert info.value.code == code
        (tmp_path / "checkpoint-7").mkdir(exist_ok=True)


def test_another_run_is_refused_and_every_difference_named(run, mixed_data, caplog):
    saving.logger.propagate = True
    result = run(stop_after=2)
    checkpoint = result.folder / "checkpoint-2"
    flags = FLAGS | {"output_dir": str(result.folder), "train_data": [mixed_data]}
    fine = tiny_config(**flags | {"num_epochs": 9, "max_tokens": 99, "num_workers": 7})
    check_same_run(checkpoint, fine, result.data.digest, 36)
    assert "--num_epochs: was 5, is 9: the learning rate follows" in caplog.text
    with pytest.raises(UserError, match="has done more than the 1 steps"):
        check_same_run(checkpoint, fine, result.data.digest, 1)
    other = tiny_config(**flags | {"learning_rate": 0.5, "seed": 3})
    with pytest.raises(UserError) as info:
        check_same_run(checkpoint, other, "another digest", 1)
    for words in (
        "--learning_rate: was 0.001, is 0.5",
        "--seed: was 0, is 3",
        "the data have changed",
        "new run",
    ):
        assert words in str(info.value)
    assert "batch_size" not in str(info.value)


def test_output_folders_that_do_not_fit(run, tmp_path):
    result = run(stop_after=2)
    with pytest.raises(UserError, match="--resume_from latest"):
        make_output_dir(result.config, None)
    elsewhere = tiny_config(output_dir=str(tmp_path / "other"))
    with pytest.raises(UserError, match="its own folder"):
        make_output_dir(elsewhere, result.folder / "checkpoint-2")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        make_output_dir(tiny_config(output_dir=str(tmp_path / "file" / "out")), None)
    with pytest.raises(UserError, match="no usable checkpoint"):
        find_checkpoint(tiny_config(output_dir=str(tmp_path / "other"), resume_from="latest"))


def test_a_full_disk_is_told_survived_and_tried_again(run, monkeypatch, caplog):
    saving.logger.propagate = True
    disk_usage, calls = shutil.disk_usage, []

    def full_at_the_second_save(path):
        calls.append(path)
        return SimpleNamespace(free=1000) if len(calls) == 2 else disk_usage(path)

    monkeypatch.setattr(saving.shutil, "disk_usage", full_at_the_second_save)
    result = run(save_steps=2, num_steps=6)
    assert [p.name for p in list_checkpoints(result.folder)] == ["checkpoint-6", "checkpoint-2"]
    assert "checkpoint-4 could not be written" in caplog.text and "GiB are free" in caplog.text
    assert not list(result.folder.glob(".*"))
    # After a signal, nobody may think that the steps are saved.
    calls[:] = [None]
    run("stopped", stop_after=3, exit_code=1)
    assert "stopped after step 3, which is NOT saved" in caplog.text
    assert "go on with" not in caplog.text


@pytest.mark.parametrize("what", ["export", "shards"])
def test_a_disk_that_fills_up_while_writing_is_survived(run, what, monkeypatch, caplog):
    saving.logger.propagate = True
    module, name = {
        "export": (load, "_write_model"),
        "shards": (saving._ShardWriter, "_write_data"),
    }[what]
    original, calls = getattr(module, name), []

    def full_at_the_second_save(*args):
        calls.append(args)
        if len(calls) == 2:
            message = "I/O error: No space left on device (os error 28)"
            raise SafetensorError(message) if what == "export" else OSError(28, message)
        return original(*args)

    monkeypatch.setattr(module, name, full_at_the_second_save)
    result = run(save_steps=2, num_steps=6)
    assert [p.name for p in list_checkpoints(result.folder)] == ["checkpoint-6", "checkpoint-2"]
    assert "checkpoint-4 could not be written" in caplog.text
    assert "No space left on device" in caplog.text
    assert not list(result.folder.glob(".*"))


def test_shards_go_into_several_files_and_come_back(run, monkeypatch):
    """What is copied from a GPU is in main memory until its file is closed."""
    monkeypatch.setattr(saving, "SHARD_FILE_BYTES", 5 * 2**20)
    stopped = run("broken", stop_after=7)
    files = list((stopped.folder / "checkpoint-7" / "resume").glob("*.distcp"))
    sizes = [path.stat().st_size for path in files]
    assert len(files) >= 8 and max(sizes) < 8 * 2**20
    resumed = run("broken", checkpoint=stopped.folder / "checkpoint-7")
    assert torch.equal(resumed.weights, run("straight").weights)


def test_what_is_saved_is_not_written_again(run, monkeypatch, tmp_path):
    """As before a bad step, after a save."""
    rename, seen = os.rename, []

    def look(source, target):
        rename(source, target)
        seen.append(target.name)

    monkeypatch.setattr(saving.os, "rename", look)
    monkeypatch.setattr(finetune, "cross_entropy_sum", BrokenLoss({4}))
    with pytest.raises(UserError, match="step 4"):
        run(max_tokens=10**6, save_steps=1)
    assert seen.count("checkpoint-3") == 1
    assert damage(tmp_path / "out" / "checkpoint-3") is None


def test_a_vanished_output_folder_is_survived(run, monkeypatch, tmp_path):
    class Vanishing(StopSignal):
        def __init__(self):
            super().__init__()
            shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(finetune, "StopSignal", Vanishing)
    with pytest.raises(FileNotFoundError):  # of this test's reading; train() itself went through
        run(num_steps=3, save_steps=1)
    (tmp_path / "out").mkdir()
    waiting = logutil.MetricsFile(tmp_path / "gone" / "metrics.jsonl")
    waiting.append({"global_step": 1})
    (tmp_path / "gone").mkdir()
    waiting.append({"global_step": 2})
    lines = (tmp_path / "gone" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [1, 2]


class BrokenLoss:
    """torch.nn.functional whose losses are infinite in chosen calls."""

    def __init__(self, bad_calls):
        self.bad_calls, self.calls = bad_calls, 0

    def __call__(self, logits, targets):
        self.calls += 1
        loss = cross_entropy_sum(logits, targets)
        return loss * float("inf") if self.calls in self.bad_calls else loss


def test_a_bad_step_stops_with_the_last_good_state(run, monkeypatch, tmp_path):
    monkeypatch.setattr(finetune, "cross_entropy_sum", BrokenLoss({4}))
    with pytest.raises(UserError, match="step 4: loss inf.*Samples of this step"):
        run(max_tokens=10**6)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert damage(checkpoint) is None
    monkeypatch.setattr(finetune, "cross_entropy_sum", cross_entropy_sum)
    resumed = run(checkpoint=checkpoint, max_tokens=10**6)
    straight = run("straight", max_tokens=10**6)
    assert torch.equal(resumed.weights, straight.weights)


def test_a_bad_first_step_leaves_no_checkpoint_that_cannot_be_resumed(run, monkeypatch, tmp_path):
    monkeypatch.setattr(finetune, "cross_entropy_sum", BrokenLoss({1}))
    with pytest.raises(UserError, match="step 1: loss inf"):
        run(max_tokens=10**6)
    assert not list_checkpoints(tmp_path / "out")


def test_saving_before_anything_was_trained_changes_nothing(run, monkeypatch, tmp_path):
    """torch would make AdamW's state up by a step of its own, which AdamW then counts."""
    results = []
    for name, save_steps in (("saved", 1), ("unsaved", 100)):
        monkeypatch.setattr(finetune, "cross_entropy_sum", BrokenLoss({1}))
        flags = {"max_tokens": 10**6, "skip_bad_steps": 1, "keep_checkpoints": 9}
        results.append(run(name, save_steps=save_steps, num_steps=4, **flags))
    assert torch.equal(*(result.weights for result in results))
    assert [p.name for p in list_checkpoints(results[0].folder)][-1] == "checkpoint-2"
    monkeypatch.setattr(finetune, "cross_entropy_sum", BrokenLoss({1, 2}))
    with pytest.raises(UserError, match="step 2"):
        run("never", max_tokens=10**6, skip_bad_steps=1)
    assert not list_checkpoints(tmp_path / "never")


def test_bad_steps_can_be_skipped_but_not_too_many_in_a_row(run, monkeypatch):
    monkeypatch.setattr(finetune, "cross_entropy_sum", BrokenLoss({2, 3, 6}))
    result = run(max_tokens=10**6, skip_bad_steps=2, num_steps=7)
    assert [m["global_step"] for m in result.metrics if m["loss"] is None] == [2, 3, 6]
    assert torch.isfinite(result.weights).all()
    monkeypatch.setattr(finetune, "cross_entropy_sum", BrokenLoss({2, 3, 4}))
    with pytest.raises(UserError, match="step 4"):
        run("again", max_tokens=10**6, skip_bad_steps=2, num_steps=7)
