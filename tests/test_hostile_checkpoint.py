"""Checkpoints from strangers: whatever they hold, nothing of it runs, and nothing is lost."""

import io
import json
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch

from helpers import CPU, run_script, set_up, tiny_config
from util import checkpoint as saving
from util.checkpoint import damage, load_checkpoint
from util.config import UserError
from util.optim import build_optimizer

EVENTS = []  # of what a checkpoint may never make Python do
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
sys.addaudithook(lambda event, args: EVENTS.append((event, args)) if event in FORBIDDEN else None)


class Evil:
    """Pickled, it runs a command as it is loaded."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


class Nested:
    """Evil as the state of something harmless."""

    def __reduce__(self):
        return dict, (), {"inside": [Evil()]}, None, iter([("key", Evil())])


@pytest.fixture(scope="module")
def original(tmp_path_factory, mixed_data, small_folder):
    """A checkpoint after one step."""
    folder = tmp_path_factory.mktemp("checkpoint") / "out"
    flags = ("--model_name_or_path", small_folder, "--device", "cpu", "--train_data", mixed_data)
    run_script("finetune.py", *flags, "--max_steps", 1, "--output_dir", folder)
    return folder / "checkpoint-1"


@pytest.fixture
def checkpoint(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(original, tmp_path / "out" / "checkpoint-1")


def seal(folder, change=lambda state: None):
    """Write the sizes and checksums of all files, as somebody who means harm does."""
    path = folder / "resume" / "state.json"
    state = json.loads(path.read_text())["state"]
    files = [p for p in folder.rglob("*") if p.is_file() and p != path]
    state["files"] = {
        str(p.relative_to(folder)): [p.stat().st_size, saving._checksum(p)] for p in files
    }
    change(state)
    path.write_text(json.dumps({"state": state, "sha256": saving._digest(state)}))


def attack(folder, mixed_data, small_folder):
    """Resume from a checkpoint; return what was said of it. Nothing of it may run."""
    EVENTS.clear()
    said = damage(folder)
    if said is None:
        run = set_up(tiny_config(train_data=[mixed_data]), small_folder)
        EVENTS.clear()  # those of loading a model
        try:
            load_checkpoint(folder, run.model, build_optimizer(run.model, run.config))
        except UserError as error:
            said = str(error)
    assert EVENTS == [] and not os.path.exists("pwned")
    return said


@pytest.mark.parametrize("content", [Evil(), Nested(), [Evil()], {"a": (Evil(),)}])
def test_pickles_beside_the_shards_are_never_loaded(content, checkpoint, mixed_data, small_folder):
    """torch looks for .metadata, and where that cannot be read for one of the rank."""
    for name in (".metadata", "__0.metadata"):
        (checkpoint / "resume" / name).write_bytes(pickle.dumps(content))
    assert "was not written with it" in damage(checkpoint)
    seal(checkpoint)
    assert attack(checkpoint, mixed_data, small_folder) is None


def zip_of(content) -> bytes:
    """Return a file as torch.save writes it, its pickle replaced."""
    whole, changed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(4), whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            data = pickle.dumps(content) if name.endswith("data.pkl") else source.read(name)
            target.writestr(name, data)
    return changed.getvalue()


@pytest.mark.parametrize("kind", ["tensor", "value"])
@pytest.mark.parametrize("make", [zip_of, pickle.dumps])
@pytest.mark.parametrize("content", [Evil(), Nested()])
def test_objects_in_the_shards_are_refused(
    content, make, kind, checkpoint, mixed_data, small_folder
):
    resume = checkpoint / "resume"
    index = json.loads((resume / "index.json").read_text())
    payload = make(content)
    for place in index["places"]:
        is_tensor = index["values"][place[0]] is not None
        if is_tensor == (kind == "tensor"):
            place[2:] = ["__9_0.distcp", 0, len(payload)]
    (resume / "__9_0.distcp").write_bytes(payload)
    (resume / "index.json").write_text(json.dumps(index))
    seal(checkpoint)
    assert f"{checkpoint}: cannot be loaded" in attack(checkpoint, mixed_data, small_folder)


def deep(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        '{"values": null, "places": []}',
        '{"values": {}, "places": [null]}',
        '{"values": {}, "places": [["a", null, "../../secret", 0, 1]]}',
        '{"values": {}, "places": [["a", null, "state.json", 0, 1]]}',
        '{"values": {}, "places": [["a", null, "__0_0.distcp", -1, 1]]}',
        '{"values": {}, "places": [["a", [1e9], "__0_0.distcp", 0, 1]]}',
        '{"values": {"a": ["os.system", [1], []]}, "places": []}',
        '{"values": {"a": ["torch.float32", ["1"], []]}, "places": []}',
        '{"values": {"a": ["torch.float32", [1], [null]]}, "places": []}',
        deep(100_000),
        '{"values": 1e999}',
    ],
)
def test_an_index_of_anything_else_is_damage(text, checkpoint):
    (checkpoint / "resume" / "index.json").write_text(text)
    seal(checkpoint)
    assert "index.json is not an index of shards" in damage(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": {"../../precious.txt": 0}},
        {"sizes": {"model.safetensors": 0}},
        {"sizes": {"train.log": -1}},
        {"sizes": {"train.log": None}},
        {"sizes": None},
        {"files": {"../../precious.txt": [0, ""]}},
        {"files": {"/etc/hostname": [0, ""]}},
        {"files": {"config.json": None}},
        {"files": []},
        {"global_step": None},
        {"global_step": "1"},
        {"eval_loss": "low"},
        {"config": None},
        {"random_states": {}},
        {"random_states": {"cpu": "zz"}},
        {"random_states": {"cpu": "00"}},
    ],
)
def test_a_state_of_wrong_names_or_types_is_damage(change, checkpoint, tmp_path, caplog):
    """The checkpoint before is used, and pruning later runs does not stumble over it."""
    (tmp_path / "precious.txt").write_text("precious")
    before = shutil.copytree(checkpoint, tmp_path / "out" / "checkpoint-0")
    seal(checkpoint, lambda state: state.update(change))
    assert "state.json cannot be read" in damage(checkpoint)
    config = tiny_config(output_dir=str(tmp_path / "out"), resume_from="latest")
    assert saving.find_checkpoint(config) == before
    saving._prune(tmp_path / "out", tiny_config(keep_checkpoints=1))
    assert (tmp_path / "precious.txt").read_text() == "precious"


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"state": null, "sha256": ""}', deep(10**5)])
def test_a_state_file_of_anything_else_is_damage(text, checkpoint):
    (checkpoint / "resume" / "state.json").write_text(text)
    assert "state.json cannot be read" in damage(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "resume/index.json", "resume/more"])
def test_links_are_not_followed_out_of_a_checkpoint(name, checkpoint, tmp_path):
    path = checkpoint / name
    outside = tmp_path / "outside"
    outside.write_bytes(path.read_bytes() if path.exists() else b"")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    assert f"{name} is a link" in damage(checkpoint)


def test_values_and_tensors_come_back_as_they_were(original, mixed_data, small_folder):
    run = set_up(tiny_config(train_data=[mixed_data]), small_folder)
    optimizer = build_optimizer(run.model, run.config)
    assert load_checkpoint(original, run.model, optimizer) == (1, None)
    weight = next(run.model.parameters())
    assert weight.device == CPU and optimizer.state[weight]["step"].item() == 1
