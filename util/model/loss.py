"""The loss: cross-entropy in chunks, without an fp32 copy of all logits."""

import sys

import torch

# Elements of the logits that the loss takes to fp32 at a time: 64 MiB.
CHUNK_ELEMENTS = 2**24


class _CrossEntropySum(torch.autograd.Function):
    """F.cross_entropy(logits.float(), targets, reduction="sum"), in fp32 a chunk at a time.

    The gradient is written over the logits where nobody else holds them: for a long vocabulary,
    a tensor of its own would be what runs out of memory.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        log_normalizers = []
        for chunk, chunk_targets in _chunks(logits[0], targets):
            wanted = chunk.gather(1, chunk_targets[:, None])[:, 0].float()
            # logsumexp by hand, in one copy: its own implementation makes a second one.
            chunk = chunk.to(torch.float32, copy=True)
            largest = chunk.amax(dim=1, keepdim=True)
            log_normalizer = chunk.sub_(largest).exp_().sum(dim=1).log_() + largest[:, 0]
            loss += (log_normalizer - wanted).sum()
            log_normalizers.append(log_normalizer)
        ctx.save_for_backward(logits, targets, torch.cat(log_normalizers))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        logits, targets, log_normalizers = ctx.saved_tensors
        # The normalizers are only held here: one reference more than they have is the caller's.
        is_held = sys.getrefcount(logits) > sys.getrefcount(log_normalizers)
        result = torch.empty_like(logits) if is_held else logits
        rows = _chunks(logits[0], targets, log_normalizers, result[0])
        for chunk, chunk_targets, log_normalizer, gradient in rows:
            chunk = chunk.to(torch.float32, copy=is_held).sub_(log_normalizer[:, None]).exp_()
            chunk.scatter_add_(1, chunk_targets[:, None], -torch.ones_like(chunk[:, :1]))
            gradient.copy_(chunk.mul_(grad_loss))
        return result, None


def _chunks(logits, *others):
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    return zip(*(tensor.split(rows) for tensor in (logits, *others)))


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy, fp32, of logits (1, K, vocab) and targets (K,).

    No fp32 copy of all logits exists at any time. The backward pass overwrites them, unless the
    caller still holds them.
    """
    return _CrossEntropySum.apply(logits, targets)
