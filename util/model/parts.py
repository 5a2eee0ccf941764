"""What is trained, and in how little memory: parts, LoRA, dtypes, checkpointing."""

import hashlib
import math
import os
import re
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from util.config import Config
from util.model.attention import PACKED, hand_over_whole_rows
from util.model.families import adds_features_in_layers, keep_samples_apart, layers_of, part_of
from util.model.four_bit import FourBitLinear, quantize_base
from util.model.tiny import cached_tiny_model


def prepare_for_training(model, config: Config, device: torch.device | None = None) -> None:
    """Freeze what --train leaves out, add LoRA, set each parameter's dtype, checkpoint layers.

    Parameters go to `device`, if given. LoRA's are to be filled by `init_lora`.
    """
    if config.lora_rank:
        add_lora(model, config)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in config.trained_parts)
    if config.precision == "bf16_4bit":
        quantize_base(model, device)
        # In bf16, but what layers add up on them is not.
        model.get_input_embeddings().register_forward_hook(lambda *args: args[-1].float())
    set_dtypes(model, config, device)
    keep_samples_apart(model)
    embedding = model.model.visual.patch_embed
    embedding.proj = PatchProjection(embedding.proj)
    if model.config._attn_implementation in PACKED:
        hand_over_whole_rows(model.model.visual)
    if not adds_features_in_layers(model):
        model.model.register_forward_pre_hook(place_media, with_kwargs=True)
    if config.compile:
        # Each by itself, when it first runs: what is compiled of one serves all of its kind,
        # whatever the lengths are. Names of parameters stay the same.
        for layer in chain(*layers_of(model)):
            layer.forward = torch.compile(layer.forward, dynamic=True)
    for part, module in (("llm", model.model.language_model), ("vision", model.model.visual)):
        if config.gradient_checkpointing in (part, "all"):
            checkpoint_layers(module)


def add_lora(model, config: Config) -> None:
    """Put low-rank adapters on every linear layer of the parts to train; all else is frozen.

    Scaled by 2 / rank: https://arxiv.org/abs/2106.09685, with the usual alpha of twice the rank.
    """
    from peft import LoraConfig, inject_adapter_in_model  # which takes a second, and few need it

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and part_of(name) in config.trained_parts
        and name != "lm_head"
    ]
    # Where Auto classes find the base; "tiny" is a name of this repo's own.
    base = cached_tiny_model() if config.is_tiny else config.model_name_or_path
    if Path(base).is_dir():
        base = os.path.abspath(base)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        # One pattern instead of hundreds of names, anchored: PEFT matches lists by their ends.
        target_modules="|".join(re.escape(name) for name in targets),
        base_model_name_or_path=base,
        # Initialized by init_lora, the same on any number of ranks.
        init_lora_weights=False,
    )
    inject_adapter_in_model(lora, model)
    model.peft_config = {"default": lora}


@torch.no_grad()
def init_lora(model, seed: int) -> None:
    """Fill LoRA's A with its usual uniform values and B with zeros.

    Each tensor has a generator of its own, so the values do not depend on the number of ranks.
    """
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.zero_()
        elif ".lora_A." in name:
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
            bound = 1 / math.sqrt(parameter.shape[1])
            values = torch.empty(parameter.shape).uniform_(
                -bound, bound, generator=torch.Generator().manual_seed(key)
            )
            if isinstance(parameter, DTensor):
                parameter.to_local().copy_(local_rows(values, parameter))
            else:
                parameter.copy_(values)


def local_rows(source, parameter: DTensor):
    """Return this rank's rows of a tensor or file slice; fully_shard deals rows as torch.chunk."""
    mesh, num_rows = parameter.device_mesh["shard"], parameter.to_local().shape[0]
    first = -(-parameter.shape[0] // mesh.size()) * mesh.get_local_rank()
    return source[first : first + num_rows]


def set_dtypes(model, config: Config, device: torch.device | None = None) -> None:
    """Give each parameter the dtype that --precision means, on `device`, if given.

    bf16: what is trained is fp32. Frozen weights of linear layers are bf16: autocast would round
    them so at every use, and nothing is ever added to them. bf16_4bit: embeddings are bf16 too, as
    in published files.
    """
    halved = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | FourBitLinear)
        for parameter in (module.weight, module.bias)
    }
    embeddings = id(model.get_input_embeddings().weight)
    # Where they are tied to lm_head, they are no linear layer's alone, and autocast rounds none.
    halved = halved | {embeddings} if config.precision == "bf16_4bit" else halved - {embeddings}
    for parameter in model.parameters():
        is_halved = config.precision == "bf16_lean" or (
            config.uses_autocast and id(parameter) in halved and not parameter.requires_grad
        )
        dtype = torch.bfloat16 if is_halved else torch.float32
        if parameter.is_floating_point():  # other than what quantize_base has put there
            parameter.data = parameter.data.to(device or parameter.device, dtype)


def checkpoint_layers(module) -> None:
    """Let the layers of `module` keep only their inputs, and compute the rest again in backward.

    Below the hooks of fully_shard, which would gather shards twice; above what is compiled, since
    packed_sdpa is not.
    """
    # There is no dropout, so no random state has to be kept for the second time.
    run_twice = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(run_twice, layer.forward)


def place_media(module, args, kwargs):
    """Put the features of pictures and clips in place, ahead of the forward pass of `module`.

    transformers 5.23 looks for their places and counts them on the device, and its backward pass
    counts once more: the host waits each time, and the device then waits for the host. They are
    known: `media_positions`, which only training has.
    """
    positions = kwargs.pop("media_positions", None)
    if positions is None:
        return None
    of_images = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("image_")}
    embeddings = module.get_input_embeddings()(kwargs.pop("input_ids"))
    features = module.get_image_features(kwargs.pop("pixel_values"), **of_images).pooler_output
    features = torch.cat(features).to(embeddings.dtype)
    return args, kwargs | {"inputs_embeds": embeddings.index_copy(1, positions, features[None])}


class PatchProjection(torch.nn.Module):
    """The Conv3d of the patch embedding, on patches (num_patches, channel, frame, row, column).

    A convolution whose stride is its kernel is a matrix product; as one, it is seven times faster
    on a CPU at the real width. Names and shapes of the parameters stay the same.
    """

    def __init__(self, convolution: torch.nn.Conv3d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
