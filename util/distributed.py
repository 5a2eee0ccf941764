"""Several ranks: process set-up, the mesh, loading into shards, export, and how failures end.

What trains is in finetune_distributed.py; nothing here touches a gradient.
"""

import logging
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState, init_empty_weights
from accelerate.utils import gather_object
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from util.config import Config, UserError, fill_defaults
from util.data.plan import Plan, Step
from util.logutil import MetricsFile, open_reporter
from util.model.attention import register_attention
from util.model.load import explained, is_exported, write_model
from util.model.parts import init_lora, local_rows, prepare_for_training
from util.model.tiny import cached_tiny_model
from util.run import StopSignal, on_main_process

# How long ranks wait for the main one, which may have much data to index.
START_TIMEOUT = timedelta(hours=2)
SHARED_FOLDER_SECONDS = 10

# ---------------------------------------------------------------- processes


def start_processes(config: Config, device: torch.device) -> PartialState:
    """Join the processes that the launcher started; `.device` is this rank's own."""
    if "RANK" not in os.environ:
        raise UserError(
            "finetune_distributed.py is one of several processes: start it by "
            "./finetune_distributed.sh, accelerate launch or torchrun (one GPU: finetune.py)"
        )
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda" and num_local > torch.cuda.device_count():
        raise UserError(
            f"{num_local} processes on this machine, but torch finds {torch.cuda.device_count()} "
            f"GPUs (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}): start "
            "one for each"
        )
    if fill_defaults(config, device.type).is_tiny:
        # Before the processes are joined: afterwards transformers writes files on rank 0 only,
        # and this machine may not be rank 0's.
        cached_tiny_model()
    state = PartialState(cpu=device.type == "cpu", timeout=START_TIMEOUT)
    if not state.is_main_process:
        # What every rank would say is said once.
        logging.getLogger("finetune").setLevel(logging.ERROR)
    return state


def main_process_metrics(config: Config) -> MetricsFile:
    """Return the metrics file of the run on the main process; elsewhere one that keeps nothing."""
    if not PartialState().is_main_process:
        return MetricsFile(Path(os.devnull))
    output_dir = Path(config.output_dir)
    return MetricsFile(output_dir / "metrics.jsonl", open_reporter(config, output_dir))


def agree_on_signal(stop: StopSignal, device: torch.device) -> None:
    """Let all ranks stop after the same step, whichever of them a signal has reached."""
    noted = stop.noted  # once: it may change at any time
    stopping = torch.full((), float(noted is not None), device=device)
    dist.all_reduce(stopping, dist.ReduceOp.MAX)
    if stopping.item():
        stop.name = noted or "a signal to another rank"


def gather_problems(problems: list[str], device: torch.device) -> list[str]:
    """Return on every rank the messages of all ranks; objects travel only where there are any."""
    count = torch.full((), float(len(problems)), device=device)
    dist.all_reduce(count)
    return gather_object(problems) if count.item() else []


def check_shared(output_dir: Path) -> None:
    """Raise UserError where ranks do not all see what the main one writes into `output_dir`.

    Every rank writes its shards of checkpoints there.
    """
    token = output_dir / f".shared-{on_main_process(uuid.uuid4).hex}"
    if PartialState().is_main_process:
        token.touch()
    dist.barrier()
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (is_seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
        with suppress(OSError):  # network file systems may remember that it was not there
            os.listdir(output_dir.parent)
    blind = [] if is_seen else [socket.gethostname()]
    blind = gather_object(blind)
    if PartialState().is_main_process:
        token.unlink()
    if blind:
        raise UserError(
            f"--output_dir {output_dir}: must be on a disk that all machines share, as each writes "
            f"its part of the checkpoints there; not seen by {', '.join(sorted(set(blind)))}"
        )


def build_mesh(state: PartialState, shard_size: int | None) -> DeviceMesh:
    """Return the mesh (replicate, shard); `shard_size` left out: all ranks of one machine.

    Neighbouring ranks shard, so that the traffic of a shard group stays within a machine.
    """
    world_size = state.num_processes
    shard_size = shard_size or min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    if world_size % shard_size:
        raise UserError(
            f"--shard_size {shard_size}: must divide the number of processes, {world_size}"
        )
    return init_device_mesh(
        state.device.type,
        (world_size // shard_size, shard_size),
        mesh_dim_names=("replicate", "shard"),
    )


# ---------------------------------------------------------------- model


def load_sharded_model(
    folder: str, attention: str, device: torch.device, mesh: DeviceMesh, config: Config
):
    """Load a model onto the ranks of `mesh`, every rank reading only what it will hold.

    The same model as load_model's. Raises UserError where weights are missing.
    """
    register_attention(attention)
    # Parameters without memory; buffers are computed, since no file holds them.
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.from_pretrained(folder),
            dtype=torch.float32,
            attn_implementation=attention,
        )
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.tie_weights()
    transforms = get_model_conversion_mapping(model)  # found by class, which sharding changes
    prepare_for_training(model, config)
    shard_model(model, mesh, config.precision)

    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()  # to_empty gives each name a tensor of its own
    with explained(folder):
        _read_shards(model, folder, transforms)
    init_lora(model, config.seed)
    return model


def shard_model(model, mesh: DeviceMesh, precision: str) -> None:
    """Shard the parameters of `model` over the mesh: by vision block, by decoder layer, the rest.

    bf16: shards stay fp32; blocks are gathered in bf16, their gradients reduced in fp32. The loop
    computes under autocast, as on one device, so activations keep their dtypes. Embeddings are
    gathered in fp32: no matrix product takes them, so on one device they are never rounded, and in
    bf16 their gradients, summed over many tokens, move the fifth loss by 1e-3.
    """
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    halved = replace(whole, param_dtype=torch.bfloat16) if precision == "bf16" else whole
    blocks = [*model.model.visual.blocks, *model.model.language_model.layers]
    if not model.config.tie_word_embeddings:
        # Gathered apart from the rest, which stays gathered for the whole micro-batch.
        fully_shard(model.model.language_model.embed_tokens, mesh=mesh, mp_policy=whole)
        blocks.append(model.lm_head)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=halved)
    fully_shard(model, mesh=mesh, mp_policy=whole)


@torch.no_grad()
def _read_shards(model, folder: str, transforms: list) -> None:
    """Copy from the safetensors files of `folder` the rows that this rank holds of each tensor."""
    # LoRA wraps a layer's weights, and the files know nothing of it.
    parameters = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    missing = set(parameters)
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                # Files may have the names of older versions; transformers knows them.
                name, converted = rename_source_key(
                    key, renamings, converters, model.base_model_prefix, parameters
                )
                if name in parameters and converted is None:
                    _copy_rows(file.get_slice(key), parameters[name])
                    missing.discard(name)
    if model.config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    if missing:
        raise UserError(f"{folder}: has no weights for {', '.join(sorted(missing)[:5])}")


def _weight_files(folder: str) -> list[Path]:
    if (Path(folder) / SAFE_WEIGHTS_NAME).is_file():
        return [Path(folder) / SAFE_WEIGHTS_NAME]
    paths = sorted(Path(folder).glob("model-*-of-*.safetensors"))
    if not (paths and (Path(folder) / SAFE_WEIGHTS_INDEX_NAME).is_file()):
        raise UserError(f"{folder}: has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    return paths


def _copy_rows(source, parameter: DTensor) -> None:
    """Copy this rank's rows of a tensor in a file."""
    if tuple(source.get_shape()) != tuple(parameter.shape):
        raise UserError(
            f"a tensor of shape {source.get_shape()} in the file, {list(parameter.shape)} in the "
            "model: config.json and weights do not belong together"
        )
    if parameter.to_local().numel():
        parameter.to_local().copy_(local_rows(source, parameter))


@torch.no_grad()
def export_sharded_model(model, processor, output_dir: str | Path) -> None:
    """Write what export_model writes, from shards: one tensor at a time is gathered.

    Only the main process keeps them, in bf16, in main memory.
    """
    state_dict = {}
    for name, tensor in model.state_dict().items():
        if not is_exported(model, name):
            continue
        # Replicas hold the same; the first is enough.
        if tensor.device_mesh["replicate"].get_local_rank() == 0:
            whole = tensor if ".lora_" in name else tensor.to(torch.bfloat16)
            whole = whole.full_tensor()
            if dist.get_rank() == 0:
                state_dict[name] = whole.cpu()
    if dist.get_rank() == 0:
        write_model(model, state_dict, processor, output_dir)


# ---------------------------------------------------------------- metrics


def rank_metrics(plan: Plan, step: Step, num_dummy_tokens: int) -> dict:
    """Return lists, one entry a rank: its tokens in `step`, by kind, and its share of dummy work.

    They follow from the plan: nothing is asked of the other ranks.
    """
    index = plan.index
    counts = {"text": [], "image": [], "video": []}
    dummy_shares = []
    for micro_batches in step.micro_batches:
        samples = [i for micro_batch in micro_batches for i in micro_batch]
        total = int(index.num_tokens[samples].sum())
        image = int(index.num_image_tokens[samples].sum())
        video = int(index.num_video_tokens[samples].sum())
        for kind, count in (("text", total - image - video), ("image", image), ("video", video)):
            counts[kind].append(count)
        dummy = num_dummy_tokens * len(micro_batches)
        dummy_shares.append(round(dummy / (total + dummy), 4))
    metrics = {f"num_{kind}_tokens_by_rank": count for kind, count in counts.items()}
    return metrics | {"dummy_share_by_rank": dummy_shares}
