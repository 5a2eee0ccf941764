"""The scripts on GPUs that compute nothing, as the launchers start them: what they ask for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from families import build_family
from helpers import (
    ENVIRONMENT,
    REPO,
    assistant,
    free_port,
    read_metrics,
    run_script,
    undamaged_steps,
    user,
    write_data,
)
from test_gpu import PLANNED
from zygote import forking

HERE = Path(__file__).parent
CAPABILITIES = (90, 80, 89, 120)  # of cuda:0 and so on
NUM_LAYERS = 6  # of tiny: blocks of the vision tower, and decoder layers
OLD, SMALL = "cuda:4", "cuda:5"
DEVICES = ",".join([*(f"{capability}:80" for capability in CAPABILITIES), "75:16", "90:0.125"])
FLASH = ("flash_fwd_", "flash_bwd_")  # kernels of flash attention
SDPA = ("fmha_cutlassF_", "fmha_cutlassB_")  # and those that spare memory in fp32 as well
MATH = ("SoftMax",)

TWO_RANKS = "finetune_distributed.sh"
# Steps of real shapes, for benchmarks/bench_gpu.py.
STEPS = {"2B in bf16_lean, one text": {"data": "one text", "precision": "bf16_lean"}}
LARGE_STEPS = {
    "2B, one text": {"data": "one text"},
    "2B, 14 short texts": {"data": "14 short texts"},
    "2B, 2 images": {"data": "2 images", "gradient_checkpointing": "all"},
    "2B in bf16_lean on 2, one text": {"data": "one text", "precision": "bf16_lean"}
    | {"num_gpus": 2, "gradient_checkpointing": "all"},
    "2B in fp32 on 2, one text": {"data": "one text", "precision": "fp32"}
    | {"num_gpus": 2, "gradient_checkpointing": "all"},
    "7B on 8, one text": {"data": "one text", "model": "7B", "num_gpus": 8},
    "7B on 8, 2 images": {"data": "2 images", "model": "7B", "num_gpus": 8}
    | {"gradient_checkpointing": "all"},
}
# Layers are alike, and the first step of fully_shard with many of them is slow.
STEPS |= {name: step | {"num_layers": 8} for name, step in LARGE_STEPS.items()}

pytestmark = pytest.mark.skipif(
    not (shutil.which("gcc") and list(Path(sys.prefix).glob("lib/*/site-packages/nvidia/cu13"))),
    reason="needs gcc, and the CUDA build of PyTorch",
)


@pytest.fixture(scope="module")
def nullgpu(tmp_path_factory) -> dict:
    """The environment of a launcher whose GPUs compute nothing, and whose programs are forked."""
    folder = tmp_path_factory.mktemp("nullgpu")
    run_script(HERE / "build.sh", folder)
    (folder / "nvidia-smi").touch(0o777)  # the launchers look whether there is one
    environment = {
        "LD_PRELOAD": f"{folder}/libcuda.so.1",
        "TRITON_LIBCUDA_PATH": str(folder),
        "NULLGPU_DEVICES": DEVICES,
        "DISABLE_PTXAS_OPT": "1",  # of Triton: nothing is computed
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5",
        "PYTHONPATH": f"{REPO}:{REPO}/tests",
        # transformers compares numbers of image tokens, which are zeros here.
        "TRANSFORMERS_DISABLE_TORCH_CHECK": "1",
    }
    command = [sys.executable, REPO / "tests" / "zygote.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT | environment, **pipes) as zygote:
        forked = forking(zygote.stdout.readline().strip())
        yield environment | forked | {"PATH": f"{folder}:{forked['PATH']}"}


@pytest.fixture(scope="module")
def report(nullgpu, tiny_folder, mixed_data, tmp_path_factory) -> dict:
    """Of each case by its name, what driver.py reports."""
    folder, cases = tmp_path_factory.mktemp("cases"), []
    texts = [[user("What? " * n), assistant("That. " * n)] for n in (2, 9, 30)]
    held_out = write_data(folder / "held_out.json", texts)

    def train(name, device, precision, *flags, output_dir=None, **more):
        own = ["--model_name_or_path", "tiny", "--num_workers", 0, "--batch_size", 8]
        own += ["--max_tokens", 600, "--device", device, "--precision", precision]
        own += ["--output_dir", f"{folder}/{output_dir or name}", *flags]
        cases.append({"name": name, "script": "finetune", "flags": own, **more})

    whole_run = ["--max_steps", 3, "--save_steps", 2, "--eval_data", held_out, "--eval_steps", 2]
    whole_run += ["--eval_generate", 2]
    for i, capability in enumerate(CAPABILITIES):
        train(f"bf16 {capability}", f"cuda:{i}", "bf16", *whole_run)
        train(f"fp32 {capability}", f"cuda:{i}", "fp32", "--max_steps", 2)
    lora = ["--lora_rank", 8, "--gradient_checkpointing", "all", "--max_steps", 2]
    train("lora", "cuda:0", "bf16", *lora, "--eval_data", "train_data/data.json")
    train("old", OLD, "bf16", "--max_steps", 2)
    again = {"output_dir": "bf16 90", "remove": [f"{folder}/bf16 90/checkpoint-3"]}
    train("resumed", "cuda:0", "bf16", *whole_run, "--resume_from", "latest", **again)
    for name, script, device, flags in (
        ("official", "test_on_official_model", "cuda:0", ["--model_name_or_path", "tiny"]),
        ("trained", "test_on_trained_model_by_us", "cuda:1", ["--model_dir", folder / "bf16 90"]),
    ):
        flags += ["--prompts", held_out, "--device", device]
        cases.append({"name": name, "script": script, "flags": [*map(str, flags)]})
    qwen3_5 = build_family("qwen3_5", tiny_folder, folder / "qwen3_5")
    short = ["--max_steps", 2, "--model_name_or_path", qwen3_5]
    train("linear", "cuda:0", "bf16", *short, cudnn=False)  # which a short convolution would take
    train("full", SMALL, "bf16", "--max_steps", 2)
    train("compiled", "cuda:0", "bf16", "--compile", "--max_steps", 3)
    train("lean", "cuda:0", "bf16_lean", "--max_steps", 3)
    cases += [{"name": name, "step": step} for name, step in STEPS.items()]
    # The test for real GPUs, on PyTorch's real allocator.
    cases += [{"name": "", "planned": [flags, mixed_data, tiny_folder]} for flags in PLANNED]
    report = drive(folder, cases, nullgpu)
    del report["printed"]
    return report


def drive(
    folder: Path, cases: list[dict], environment: dict, launcher="finetune.sh", code=0
) -> dict:
    """Let a launcher start driver.py in place of its script, and return the report.

    As "printed", it has what was printed.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    repo = folder / "repo"
    repo.mkdir()
    for name in (launcher, "util", "requirements.txt", "train_data"):
        (repo / name).symlink_to(REPO / name)
    (repo / launcher).with_suffix(".py").symlink_to(HERE / "driver.py")
    printed = run_script(repo / launcher, folder, code=code, **environment)
    return json.loads((folder / "report.json").read_text()) | {"printed": printed}


def launched(counts: dict, names: tuple[str, ...]) -> list[int]:
    """Return how often kernels were launched whose names have each of `names` in them."""
    return [sum(n for kernel, n in counts.items() if name in kernel) for name in names]


def test_every_run_ends_well_but_where_memory_is_full(report):
    ends = {name: case["end"] for name, case in report.items() if name not in STEPS}
    assert "--gradient_checkpointing all; a lower --max_tokens" in ends.pop("full")
    assert not any(ends.values()), ends


def check_segments(case: dict) -> None:
    """The launchers ask for segments that grow."""
    assert case["total"]["cuMemCreate"] > case["total"].get("cudaMalloc", 0)


def test_memory_is_mapped_into_segments_that_grow(report):
    """Also where it was full, and that was said."""
    check_segments(report["bf16 90"])
    check_segments(report["full"])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bf16_attends_by_one_flash_kernel_a_layer(capability, report):
    case = report[f"bf16 {capability}"]
    for step in case["steps"]:
        assert (
            launched(step, ("flash_fwd_kernel", "flash_bwd_dq_dk_dv"))
            == [NUM_LAYERS * step["micro_batches"]] * 2
        )
        assert launched(step, (*SDPA, *MATH)) == [0, 0, 0]
    # Answers are generated by PyTorch's attention.
    assert launched(case["total"], SDPA)[0] > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fp32_attends_without_a_matrix_of_all_pairs(capability, report):
    for step in report[f"fp32 {capability}"]["steps"]:
        assert min(launched(step, SDPA)) > 0
        assert launched(step, (*FLASH, *MATH)) == [0, 0, 0]


def test_an_old_gpu_attends_in_bf16_with_a_matrix_of_all_pairs(report):
    assert launched(report["old"]["total"], (*FLASH, *SDPA, *MATH))[:4] == [0] * 4
    assert launched(report["old"]["total"], MATH)[0] > 0


def test_cudnn_is_never_asked_to_attend(report):
    """Nowhere: neither in training nor for an answer, whose attention may choose it on 9.0."""
    totals = [case.get("total") or case["counts"] for case in report.values()]
    assert not any("cudnnBackendCreateDescriptor" in total for total in totals)


def test_the_host_waits_once_a_step(report):
    """To read loss and gradient norm; where it is more, `waits` has the lines."""
    for name, case in report.items():
        for step in case.get("steps", [])[name in ("compiled", "lean") :]:  # compiling waits
            assert step["waits"] == step["device_to_host"] == 1, (name, case["waits"])


@pytest.mark.parametrize("name, most", [("bf16 90", 1150), ("fp32 90", 1050), ("lora", 2050)])
def test_a_micro_batch_launches_and_copies_no_more_than_it_did(name, most, report):
    """The optimizer's few hundred launches a step are in it."""
    for step in report[name]["steps"]:
        assert step["launches"] <= most * step["micro_batches"]
        # Its own tensors, and nothing that was already there.
        assert step["host_to_device"] <= 10 * step["micro_batches"]


def test_compiled_layers_launch_less_and_are_compiled_once(report):
    first, *steps = report["compiled"]["steps"]
    for step, plain in zip(steps, report["bf16 90"]["steps"][1:], strict=True):
        assert step["graphs"] == first["graphs"] > 0
        assert step["launches"] < 0.6 * plain["launches"]
        assert launched(step, FLASH[:1]) == launched(plain, FLASH[:1])


@pytest.mark.parametrize("name, most", [("2B, one text", 2600), ("2B, 14 short texts", 2500)])
def test_eight_layers_of_2b_launch_no_more_than_they_did(name, most, report):
    assert report[name]["counts"]["launches"] <= most


def test_the_optimizer_of_bf16_lean_takes_little_of_the_host(report):
    """For 2B, it took 360 ms of CPU time, and a graph was compiled for each of 17 shapes."""
    step = report["2B in bf16_lean, one text"]
    assert step["optimizer_ms"] < 100
    # What is compiled for the four sizes of blocks in tiny serves those of 2B, whatever its shapes.
    first, *others = report["lean"]["steps"]
    assert first["graphs"] - report["compiled"]["steps"][-1]["graphs"] == 4
    assert {other["graphs"] - first["graphs"] for other in others} == {0} == {step["num_graphs"]}


@pytest.mark.slow
@pytest.mark.parametrize("data, most", [("one text", 3800), ("14 short texts", 3700)])
def test_a_compiled_step_of_2b_launches_less_than_half(data, most, nullgpu, tmp_path):
    case = {"name": data, "step": {"data": data, "compile": True}}
    assert drive(tmp_path, [case], nullgpu)[data]["counts"]["launches"] <= most


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_a_real_shape_waits_for_nothing_and_takes_what_was_planned(name, report):
    check_step(report[name])


@pytest.mark.slow
def test_so_does_one_of_all_layers(nullgpu, tmp_path):
    cases = [{"name": name, "step": step} for name, step in LARGE_STEPS.items()]
    report = drive(tmp_path, cases, nullgpu)
    for name in LARGE_STEPS:
        check_step(report[name])
    assert report["2B, one text"]["counts"]["launches"] <= 8200
    assert report["2B, 14 short texts"]["counts"]["launches"] <= 8100


def check_step(step: dict) -> None:
    assert "waits" not in step["counts"]  # nothing is read, as the loop does once
    peak = step["allocated_gib"]
    assert abs(step["planned_gib"] - peak) < 0.05 * peak + 64 / 1024


def test_a_resumed_run_asks_for_what_the_whole_one_did(report):
    whole, resumed = report["bf16 90"]["steps"][-1], report["resumed"]["steps"][-1]
    assert len(report["resumed"]["steps"]) == 1
    assert abs(resumed["launches"] - whole["launches"]) <= 0.01 * whole["launches"]


FLASH_ATTN = """
import torch
from torch.nn.attention.varlen import varlen_attn
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           dropout_p=0.0, softmax_scale=None, causal=False):
    assert all(x.is_cuda and x.dtype == torch.bfloat16 for x in (q, k, v))
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                       window_size=(-1, 0) if causal else (max_seqlen_q, max_seqlen_q),
                       scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1])
flash_attn_func = flash_attn_with_kvcache = pad_input = unpad_input = None
"""


def test_the_package_flash_attn_is_used_where_it_is_installed(nullgpu, tmp_path):
    """A package that has its name and PyTorch's kernels."""
    for name, text in {
        "flash_attn/__init__.py": FLASH_ATTN,
        "flash_attn/bert_padding.py": FLASH_ATTN,
        "flash_attn-2.8.3.dist-info/METADATA": "Name: flash-attn\nVersion: 2.8.3\n",
        "flash_attn-2.8.3.dist-info/top_level.txt": "flash_attn\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    flags = ["--model_name_or_path", "tiny", "--precision", "bf16", "--num_workers", 0]
    flags += ["--max_steps", 2, "--output_dir", str(tmp_path / "out")]
    environment = nullgpu | {"PYTHONPATH": f"{tmp_path}:{nullgpu['PYTHONPATH']}"}
    # Not forked: it is looked for as transformers is imported.
    environment["PATH"] = f"{Path(nullgpu['LD_PRELOAD']).parent}:{os.environ['PATH']}"
    case = {"name": "it", "script": "finetune", "flags": flags}
    report = drive(tmp_path, [case], environment)["it"]
    assert not report["end"], report["end"]
    assert "attention flash_attention_2" in (tmp_path / "out" / "train.log").read_text()
    for step in report["steps"]:
        assert launched(step, FLASH[:1]) == [NUM_LAYERS * step["micro_batches"]]
        assert step["waits"] == 1, report["waits"]


@pytest.fixture(scope="module")
def two_gpus(nullgpu) -> dict:
    """The environment of a launcher that finds two."""
    return nullgpu | {"CUDA_VISIBLE_DEVICES": "0,1", "MAIN_PROCESS_PORT": free_port()}


@pytest.fixture(scope="module")
def two_ranks(two_gpus, tmp_path_factory) -> tuple[Path, dict]:
    """A folder with runs of two ranks by their shard size, and the first rank's report."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--model_name_or_path", "tiny", "--precision", "bf16", "--num_workers", 0]
    flags += ["--max_steps", 3, "--save_steps", 2]
    cases = [
        {"name": size, "script": "finetune_distributed"}
        | {"flags": [*flags, "--shard_size", size, "--output_dir", str(folder / size)]}
        for size in "12"
    ]
    flags += ["--output_dir", str(folder / "full")]
    cases.append({"script": "finetune_distributed", "flags": flags, "room": 1e-3})
    return folder, drive(folder, cases, two_gpus, TWO_RANKS, code=1)


@pytest.mark.parametrize("size, sum_up", [("1", "ncclAllReduce"), ("2", "ncclReduceScatter")])
def test_two_ranks_train_save_and_wait_once_a_step(size, sum_up, two_ranks):
    """Objects, flags and long waits go over gloo; through this NCCL nothing would arrive."""
    folder, report = two_ranks
    assert report["limits"] == [2 * 3600, 600]  # seconds, of gloo and NCCL
    assert not report[size]["end"], report[size]["end"]
    for step in report[size]["steps"]:
        assert step["waits"] == step["device_to_host"] == 1, report[size]["waits"]
        assert step[sum_up] > NUM_LAYERS
    assert "waits" not in report[size]["between"][0]
    check_segments(report[size])
    assert len(read_metrics(folder / size)) == 3 and len(undamaged_steps(folder / size)) == 2
    printed = (folder / size / "train.log").read_text()
    assert "on cuda:0, bf16, attention packed_varlen" in printed
    assert f"{2 // int(size)} replicas, each over {size}" in printed


def test_two_ranks_whose_memory_is_full_say_what_to_do(two_ranks):
    _, report = two_ranks
    assert "--gradient_checkpointing all; a lower" in report["printed"].split("Root Cause")[1]
