"""Parameter groups, optimizer and learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed.tensor as dtensor
from torch.distributed.tensor import DTensor

from util.config import Config
from util.model.families import part_of

# Of AdamW in bf16_lean, as torch has them by default.
BETAS, EPSILON = (0.9, 0.999), 1e-8
MOMENTS, SCALES = ("exp_avg", "exp_avg_sq"), ("exp_avg_scale", "exp_avg_sq_scale")
# Values that it updates at a time. The CPU's caches hold what it works on.
LEAN_VALUES = {"cpu": 2**18, "cuda": 2**24}


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
        return LeanAdamW(groups)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def lean_block_size(parameter: torch.Tensor) -> int | None:
    """Return how many values of a moment share a scale in bf16_lean's 8 bits; None: it is fp32.

    As in https://arxiv.org/abs/2110.02861, small tensors keep full moments. Shards are rows, so a
    row is made of whole blocks, which are then the same on any number of ranks.
    """
    if parameter.ndim < 2 or parameter.numel() < 4096:
        return None
    row = parameter.shape[1:].numel()
    return next((size for size in range(256, 63, -1) if row % size == 0), None)


class LeanAdamW(torch.optim.Optimizer):
    """AdamW with moments of 8 bits, for bf16 weights, which it rounds stochastically.

    It takes LEAN_VALUES at a time, of a part of a large tensor or of several small ones: that
    bounds the memory of a step, and what the host has to start. On CUDA, a kernel compiled for each
    size of a block does all; a kernel for each operation would move some ten times the bytes.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {"lr": 0.0, "step": 0})
        device = self.param_groups[0]["params"][0].device
        self._num_values = LEAN_VALUES[device.type]
        self._codes = [[t.to(device) for t in make_code(signed)] for signed in (True, False)]
        self._update = _update_lean
        if device.type == "cuda":
            self._update = torch.compile(_update_lean, fullgraph=True, dynamic=False)

    def load_state_dict(self, state_dict: dict) -> None:
        """Take a state as it is: torch would give the moments the dtype of the weights."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for parameter, key in zip(group["params"], saved["params"]):
                self.state[parameter] = dict(state_dict["state"].get(key, {}))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update all weights that have a gradient. closure: None."""
        for group in self.param_groups:
            group["step"] += 1
            corrections = [1 - beta ** group["step"] for beta in BETAS]
            # Tensors: numbers would be compiled in.
            factors = [
                torch.tensor(group["lr"] / corrections[0]),
                torch.tensor(corrections[1] ** -0.5),
                torch.tensor(group["lr"] * group["weight_decay"]),
            ]
            by_block_size = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    block_size = lean_block_size(parameter)
                    by_block_size[block_size].append(self._blocks_of(parameter, block_size))
            for block_size, tensors in by_block_size.items():
                update = self._update if block_size else _update_lean
                for chunk in _chunks(tensors, self._num_values // (block_size or 1)):
                    _update_together(partial(update, *self._codes, factors), chunk)

    def _blocks_of(self, parameter: torch.Tensor, block_size: int | None) -> list[torch.Tensor]:
        """Return gradient, weights, moments and their scales, of this rank, with a block a row."""
        state, row = self.state[parameter], parameter.shape[1:].numel()
        if not state and block_size:
            state |= {name: _zeros(parameter, row, torch.uint8) for name in MOMENTS}
            state |= {name: _zeros(parameter, row // block_size, torch.float32) for name in SCALES}
        elif not state:
            state |= {name: _zeros(parameter, row, torch.float32) for name in MOMENTS}
        changed = [parameter, *(state[name] for name in MOMENTS)]
        # Views: what is written into a copy would be lost.
        blocks = [_local(tensor).view(-1, block_size or 1) for tensor in changed]
        blocks += [_local(state[name]).view(-1, 1) for name in SCALES if block_size]
        return [_local(parameter.grad).reshape(-1, block_size or 1), *blocks]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _zeros(parameter: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of shape (rows of `parameter`, width), sharded as it is."""
    shape = len(parameter), width
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return dtensor.zeros(shape, dtype=dtype, device_mesh=mesh, placements=placements)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def _chunks(tensors: list[list[torch.Tensor]], num_rows: int) -> Iterator[list[list]]:
    """Yield what lies at the same rows of each parameter's tensors, `num_rows` at most at a time.

    Of small parameters, that is several.
    """
    chunk, free = [], num_rows
    for of_parameter in tensors:
        for start in range(0, len(of_parameter[0]), num_rows):
            rows = [tensor[start : start + num_rows] for tensor in of_parameter]
            if len(rows[0]) > free:
                yield chunk
                chunk, free = [], num_rows
            chunk.append(rows)
            free -= len(rows[0])
    if chunk:
        yield chunk


def _update_together(update: Callable, chunk: list[list]) -> None:
    """Call `update`, which changes all tensors but gradients, on parameters joined to one."""
    parts = list(zip(*chunk))
    joined = [torch.cat(part) if len(chunk) > 1 else part[0] for part in parts]
    for tensor in joined:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # compiled once for any number of rows
    update(*joined)
    if len(chunk) > 1:
        for part, tensor in zip(parts[1:], joined[1:]):
            torch._foreach_copy_(part, tensor.split([len(rows) for rows in part]))


def make_code(signed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the 256 values that 8 bits stand for, in order; where the next one is nearer; a table.

    The values are those of bitsandbytes and torchao, `create_dynamic_map`, finer towards zero
    (https://arxiv.org/abs/1511.04561). The table has for each upper half of an fp32's bits the code
    of the lowest number with it: where the number itself has another, it is the next.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        means = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [means, -means] if signed else [means]
    values = torch.cat(values).sort().values
    middles = torch.cat([(values[:-1] + values[1:]) / 2, torch.tensor([math.inf])])
    lowest = torch.arange(2**16, dtype=torch.int32) << 16
    lowest[2**15 :] += 2**16 - 1  # of negative numbers
    table = torch.bucketize(lowest.view(torch.float32), middles[:-1], right=True)
    return values, middles, table.to(torch.uint8)


def decode(codes: torch.Tensor, scales: torch.Tensor | None, code: list) -> torch.Tensor:
    if scales is None:
        return codes
    return code[0].index_select(0, codes.flatten().int()).view_as(codes) * scales


def encode(moment: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, code) -> None:
    if scales is None:
        codes.copy_(moment)
        return
    _, middles, table = code
    scales.copy_(moment.abs().amax(-1, keepdim=True).clip(1e-12))
    moment = (moment / scales).flatten()
    found = table.index_select(0, (moment.view(torch.int32) >> 16) & 0xFFFF)
    found += moment >= middles.index_select(0, found.int())
    codes.copy_(found.view_as(codes))


def _update_lean(
    signed, unsigned, factors, grads, weights, first, second, first_scales=None, second_scales=None
) -> None:
    """Update blocks of weights and moments in place."""
    lr, correction, decay = factors
    moment = decode(first, first_scales, signed).lerp(grads.float(), 1 - BETAS[0])
    square = decode(second, second_scales, unsigned).lerp(grads.float().square(), 1 - BETAS[1])
    change = lr * moment / (square.sqrt() * correction + EPSILON) + decay * weights
    encode(moment, first, first_scales, signed)
    encode(square, second, second_scales, unsigned)
    # bf16 is the upper half of fp32. Random bits added below carry into it as often as what is cut
    # off says: on average, nothing is lost.
    bits = (weights.float() - change).view(torch.int32)
    bits = (bits + torch.randint_like(bits, 2**16)) & -(2**16)
    weights.copy_(bits.view(torch.float32))


def moment_bytes(parameter: torch.Tensor, config: Config) -> int:
    """Return the bytes that `build_optimizer` keeps for a trained parameter: two moments.

    The planner and the check of free space on the disk ask here.
    """
    count, block_size = parameter.numel(), lean_block_size(parameter)
    if config.precision == "bf16_lean" and block_size:
        return 2 * (count + count // block_size * 4)
    return 2 * count * 4


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: Config
) -> float:
    """Set the learning rate of a step, counted from 0, in every parameter group; return it."""
    lr = learning_rate_at(step, num_steps, config.learning_rate, config.warmup_ratio)
    for group in optimizer.param_groups:
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
