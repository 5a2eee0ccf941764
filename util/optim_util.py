"""Parameter groups, optimizer and learning-rate schedule."""

import math

import torch


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """Return two groups for AdamW: decay on matrices, none on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters; the loop sets the learning rate of each step."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, fused=True)


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Return the learning rate of step `step` of `num_steps`, both counted from 0.

    Linear warm-up whose first value is above zero, then a cosine whose last value is.
    """
    num_warmup_steps = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
