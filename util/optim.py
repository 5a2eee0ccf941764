"""Parameter groups, optimizer and learning-rate schedule."""

import math

import torch
import torch._functorch.config
from torch.distributed.tensor import DTensor

from util.config import Config
from util.model.families import part_of


def parameter_groups(model, config: Config) -> list[dict]:
    """Return the groups of trained parameters, by what --weight_decay and learning rates say.

    Decay is on matrices, not on biases and norms. `lr_scale` is what the learning rate of the
    step is multiplied with: other than 1 in vision tower and merger with --vision_learning_rate.
    """
    vision_scale = (config.vision_learning_rate or config.learning_rate) / config.learning_rate
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr_scale = 1.0 if part_of(name) == "llm" else vision_scale
            key = lr_scale, config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": lr_scale, "weight_decay": weight_decay}
        for (lr_scale, weight_decay), parameters in groups.items()
    ]


def build_optimizer(model, config: Config) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters; the loop sets the learning rate of each step.

    With bf16_lean its moments take 8 bits, and weights are rounded stochastically: to the nearest
    bf16, an update of 1e-5 would change nothing. Sources: https://arxiv.org/abs/2110.02861,
    https://arxiv.org/abs/2010.06192.
    """
    groups = parameter_groups(model, config)
    if config.precision == "bf16_lean":
        return _build_lean_adamw(groups)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def lean_block_size(parameter: torch.Tensor) -> int | None:
    """Return how many values of a moment share a scale in bf16_lean's 8 bits; None: it is fp32.

    As in https://arxiv.org/abs/2110.02861, small tensors keep full moments. Shards are rows, so a
    row is made of whole blocks, which are then the same on any number of ranks.
    """
    if parameter.ndim < 2 or parameter.numel() < 4096:
        return None
    row = parameter.shape[1:].numel()
    largest = max(size for size in range(1, 257) if row % size == 0)
    return largest if largest >= 64 else None


def _build_lean_adamw(groups: list[dict]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit  # takes seconds to import
    from torchao.optim.subclass_8bit import OptimState8bit

    class LeanAdamW(AdamW8bit):
        """AdamW8bit for shards of any size.

        torchao 0.18.0 decides by a rank's own shard what is kept in 8 bits, and the dtype that it
        gives a moment is lost as the moment becomes a shard, so that compiling its step fails.
        """

        def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
            block_size, sharded = lean_block_size(p), isinstance(p, DTensor)
            if sharded:
                num_rows, num_shards = p.shape[0], p.device_mesh["shard"].size()
                if -(-num_rows // num_shards) * (num_shards - 1) >= num_rows:
                    block_size = None  # the last ranks have no rows, of which torchao makes nothing
            if block_size is None:
                # In bf16, 0.999 of a second moment is rounded back to all of it: it never falls.
                return torch.zeros_like(p, dtype=torch.float32)
            local = p.to_local() if sharded else p
            moment = OptimState8bit.zeros(local.shape, signed, block_size, local.device)
            if not sharded:
                return moment
            return DTensor.from_local(
                moment, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
            )

    # The cache of compiled code on disk tells such moments apart by their shape alone, not by their
    # blocks (torchao 0.18.0 has no _stable_hash for them): code of other runs could be taken.
    torch._functorch.config.enable_autograd_cache = False
    return LeanAdamW(groups, lr=0.0, bf16_stochastic_round=True)


def moment_bytes(parameter: torch.Tensor, config: Config) -> int:
    """Return the bytes that `build_optimizer` keeps for a trained parameter: two moments.

    The planner and the check of free space on the disk ask here.
    """
    count, block_size = parameter.numel(), lean_block_size(parameter)
    if config.precision == "bf16_lean" and block_size:
        return 2 * (count + count // block_size * 4)
    return 2 * count * 4


def optimizer_step_bytes(parameters: list[torch.Tensor], config: Config) -> int:
    """Return what an optimizer step takes besides: in bf16_lean, two fp32 copies of a tensor.

    Seen on a CPU with torchao 0.18.0, which steps through the tensors one by one.
    """
    return 8 * max(p.numel() for p in parameters) if config.precision == "bf16_lean" else 0


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: Config
) -> float:
    """Set the learning rate of a step, counted from 0, in every parameter group; return it."""
    lr = learning_rate_at(step, num_steps, config.learning_rate, config.warmup_ratio)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # AdamW8bit: a number would be compiled in
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]
    return lr


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Return the learning rate of step `step` of `num_steps`, both counted from 0.

    Linear warm-up whose first value is above zero, then a cosine whose last value is.
    """
    num_warmup_steps = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
