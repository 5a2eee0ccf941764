"""Several ranks: process set-up, the mesh, loading into shards, export, and how failures end.

What trains is in finetune_distributed.py; nothing here touches a gradient.
"""

import atexit
import itertools
import logging
import os
import signal
import socket
import threading
import time
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
from util.model.attention import choose_attention, register_attention
from util.model.families import layers_of
from util.model.four_bit import FourBitLinear, quantize
from util.model.load import explained
from util.model.parts import init_lora, local_rows, prepare_for_training
from util.model.tiny import cached_tiny_model
from util.run import choose_device, end_rank, rank, record_failure, shard_size, world_size

# How long ranks wait for the main one, which may have much data to index.
START_TIMEOUT = timedelta(hours=2)
# And for tensors of the others, once they train.
NCCL_TIMEOUT = timedelta(minutes=10)
# Ranks show that they are alive, and end where another one does not for so long.
BEAT_SECONDS, SILENT_SECONDS = 10, 5 * 60

# ---------------------------------------------------------------- processes


def start_processes(config: Config) -> torch.device:
    """Join the processes that the launcher started, and return this rank's own device."""
    device = choose_device(config.device)
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
    # Messages, flags and long waits go over gloo, also between GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else None
    state = PartialState(cpu=device.type == "cpu", timeout=START_TIMEOUT, backend=backend)
    _watch_ranks()
    if not state.is_main_process:
        # What every rank would say is said once.
        logging.getLogger("finetune").setLevel(logging.ERROR)
    shard_size(config)  # a wrong one is told now
    return state.device


def _watch_ranks() -> None:
    """Start threads that end this rank where another one is silent for SILENT_SECONDS.

    One that is stopped, or on a machine that is gone, would be waited for without end. Every rank
    beats as long as its process runs, also while it waits or writes. A silent one on this machine
    is killed: the launcher's signals do not reach it.
    """
    # Of its own: a connection that is shared has one thread wait for the other.
    store = dist.distributed_c10d._get_default_store().clone()
    keys = [f"beat of rank {i}" for i in range(world_size())]
    own, number = f"{socket.gethostname()}, process {os.getpid()}", itertools.count()
    missed = [0] * len(keys)

    def beat(last: str = "") -> None:
        with suppress(RuntimeError):  # the store goes with its machine
            store.set(keys[rank()], last or f"{own}:{next(number)}")

    def listen() -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            beat()
            with suppress(RuntimeError):
                new = store.multi_get(keys)  # from a machine that hangs, there is no answer
                for i, value in enumerate(new):
                    if value != values[i] or value == b"done":
                        missed[i] = 0
                values[:] = new

    def watch() -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            # Counted and not timed: where it was this rank that was stopped, it has missed nothing.
            missed[:] = [count + 1 for count in missed]
            own_count, limit = missed[rank()], SILENT_SECONDS / BEAT_SECONDS
            silent = [i for i, count in enumerate(missed) if count - own_count > limit]
            if own_count > limit:  # what all ranks speak through is silent
                silent = [rank()]
            if silent:
                _end_for({i: values[i] for i in silent}, own)

    beat()
    dist.barrier()
    values = store.multi_get(keys)
    atexit.register(beat, "done")
    for loop in (listen, watch):
        threading.Thread(target=loop, daemon=True).start()


def _end_for(silent: dict[int, bytes], own: str) -> None:
    """End this rank, and silent ones on this machine. silent: the last beats of ranks."""
    places = {i: value.decode().split(":")[0] for i, value in silent.items()}
    names = "; ".join(f"rank {i} ({place})" for i, place in places.items())
    if rank() in silent:
        places, names = {}, f"the launcher on {os.environ.get('MASTER_ADDR')}"
    try:  # the launcher is told of an exception that is being handled
        raise UserError(
            f"{names}: silent for {SILENT_SECONDS / 60:g} minutes: stopped, or its machine is "
            "gone. What was saved before is whole: --resume_from latest goes on with it"
        )
    except UserError as error:
        record_failure(error)
    time.sleep(2)  # the launcher tells who was first to fail, in whole seconds
    host, separator, _ = own.rpartition(" ")
    for place in places.values():
        if place.startswith(host + separator):
            with suppress(OSError):
                os.kill(int(place.removeprefix(host + separator)), signal.SIGKILL)
    end_rank(1)


def gather_problems(problems: list[str]) -> list[str]:
    """Return on every rank the messages of all ranks; objects travel only where there are any."""
    count = torch.full((), float(len(problems)))  # on the CPU: no rank waits for its device
    dist.all_reduce(count)
    return gather_object(problems) if count.item() else []


def build_mesh(device: torch.device, config: Config) -> DeviceMesh:
    """Return the mesh (replicate, shard) of all ranks.

    Neighbouring ranks shard, so that the traffic of a shard group stays within a machine.
    """
    shards = shard_size(config)
    shape = (world_size() // shards, shards)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    if device.type == "cuda":
        for group in (dist.group.WORLD, *mesh.get_all_groups()):
            group._get_backend(device).set_timeout(NCCL_TIMEOUT)
    return mesh


# ---------------------------------------------------------------- model


def load_sharded_model(folder: str, device: torch.device, config: Config):
    """Load a model onto all ranks, every rank reading only what it will hold.

    The same model as load_model's. Raises UserError where weights are missing.
    """
    mesh = build_mesh(device, config)
    attention = choose_attention(device, config.precision)
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
    shard_model(model, mesh, config)

    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()  # to_empty gives each name a tensor of its own
    with explained(folder):
        _read_shards(model, folder, transforms)
    init_lora(model, config.seed)
    return model


def shard_model(model, mesh: DeviceMesh, config: Config) -> None:
    """Shard the parameters of `model` over the mesh: by vision block, by decoder layer, the rest.

    bf16: shards stay fp32; blocks are gathered in bf16, their gradients reduced in fp32. The loop
    computes under autocast, as on one device, so activations keep their dtypes. Embeddings are
    gathered in fp32: no matrix product takes them, so on one device they are never rounded, and in
    bf16 their gradients, summed over many tokens, move the fifth loss by 1e-3.
    """
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    halved = replace(whole, param_dtype=torch.bfloat16) if config.uses_autocast else whole
    vision_blocks, layers = layers_of(model)
    blocks = [*vision_blocks, *layers]
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
    # Rounded as a whole and then dealt out: to the same bytes on any number of ranks.
    four_bit = {
        name.replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, FourBitLinear)
    }
    missing = {name for name in parameters if not name.endswith("scales")}
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                # Files may have the names of older versions; transformers knows them.
                name, converted = rename_source_key(
                    key, renamings, converters, model.base_model_prefix, parameters
                )
                if name not in parameters or converted is not None:
                    continue
                missing.discard(name)
                module = four_bit.get(name.removesuffix(".weight"))
                if module is None:
                    _copy_rows(file.get_slice(key), parameters[name])
                    continue
                weight = file.get_tensor(key).to(module.weight.device)
                for part, values in quantize(weight).items():
                    _copy_rows(values, getattr(module, part))
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
    """Copy this rank's rows of a tensor, or of one in a file."""
    shape = source.shape if isinstance(source, torch.Tensor) else source.get_shape()
    if tuple(shape) != tuple(parameter.shape):
        raise UserError(
            f"a tensor of shape {list(shape)} in the file, {list(parameter.shape)} in the "
            "model: config.json and weights do not belong together"
        )
    if parameter.to_local().numel():
        parameter.to_local().copy_(local_rows(source, parameter))
