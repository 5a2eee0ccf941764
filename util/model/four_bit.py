"""Frozen linear layers in 4 bits: NF4 with double quantization, as bitsandbytes has it.

https://arxiv.org/abs/2305.14314: each weight is one of 16 levels times a scale that 64 weights
share; the scales take 8 bits each, with a scale of their own for 256 of them. bitsandbytes is not
in requirements.txt: PEFT imports it wherever it is installed, which every start would pay for.
"""

import math

import torch
from torch.nn import Parameter

from util.config import require_bitsandbytes
from util.model.families import part_of

BLOCK, OUTER_BLOCK = 64, 256
NUM_LEVELS = 256  # of a scale of 8 bits


class FourBitLinear(torch.nn.Module):
    """A frozen linear layer that keeps its weight in 4 bits, and computes as nn.Linear does.

    weight (two to a byte, as a column), scales, and what the scales are made with are parameters
    of bytes, so that fully_shard deals and gathers them as it does all weights, and casts none.
    """

    def __init__(self, linear: torch.nn.Linear, device: torch.device | None = None):
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        weight = linear.weight.detach()
        for name, values in quantize(weight.to(device or weight.device)).items():
            self.register_parameter(name, Parameter(values, requires_grad=False))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply with the weight as it is made up for the moment, also in the backward pass."""
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import QuantState

        dtype, device_type = inputs.dtype, inputs.device.type
        if torch.is_autocast_enabled(device_type):  # which knows no operations of bitsandbytes
            dtype = torch.get_autocast_dtype(device_type)
        levels, outer, offset = self.of_scales.view(torch.float32).split(
            [NUM_LEVELS, self.of_scales.numel() // 4 - NUM_LEVELS - 1, 1]
        )
        outer = QuantState(outer, code=levels, blocksize=OUTER_BLOCK, dtype=torch.float32)
        state = QuantState(self.scales, self.shape, None, BLOCK, "nf4", dtype, offset[0], outer)
        bias = None if self.bias is None else self.bias.to(dtype)
        return matmul_4bit(inputs.to(dtype), self.weight, state, bias=bias)


def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return FourBitLinear's parameters by name; of a weight on meta, their sizes alone."""
    if weight.is_meta:
        num_scales = math.ceil(weight.numel() / BLOCK)
        num_floats = NUM_LEVELS + math.ceil(num_scales / OUTER_BLOCK) + 1
        sizes = {"weight": (math.ceil(weight.numel() / 2), 1), "scales": num_scales}
        sizes["of_scales"] = 4 * num_floats
        return {n: torch.empty(s, dtype=torch.uint8, device="meta") for n, s in sizes.items()}
    require_bitsandbytes()
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    of_scales = torch.cat([state.state2.code, state.state2.absmax, state.offset[None]])
    of_scales = of_scales.view(torch.uint8)
    return {"weight": packed, "scales": state.absmax, "of_scales": of_scales}


def quantize_base(model, device: torch.device | None = None) -> None:
    """Put FourBitLinear for the linear layers of the language model, on `device`, if given.

    One after the other, so that never two copies of the model are held. Adapters and lm_head stay.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and part_of(name) == "llm"
        and name != "lm_head"
        and ".lora_" not in name
    ]
    for name in names:
        model.set_submodule(name, FourBitLinear(model.get_submodule(name), device))
