"""Attention within the segments of a packed row."""

import logging
from copy import copy
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention.varlen import varlen_attn
from transformers.utils import is_flash_attn_2_available

logger = logging.getLogger("finetune")


def choose_attention(device: torch.device, precision: str) -> str:
    """Return the name of the attention to train with.

    On GPUs from compute capability 8.0 on, in bf16, the kernels of flash attention run: by the
    package flash-attn where it is installed, else by those that come with PyTorch.
    """
    if device.type != "cuda" or precision == "fp32":
        return "packed_sdpa"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return "flash_attention_2" if is_flash_attn_2_available() else "packed_varlen"
    logger.warning(
        f"{device} has compute capability {major}.{minor}: no kernel there spares attention in "
        "bf16 the memory for all pairs of tokens. Train with --precision fp32, or on a GPU of 8.0 "
        "or more; else keep --max_tokens low"
    )
    return "packed_sdpa"


def segment_lengths(cu_seqlens: torch.Tensor) -> list[int]:
    """Return the lengths of segments whose ends `cu_seqlens` holds, on the CPU, with a 0 before."""
    return [end - begin for begin, end in pairwise(cu_seqlens.tolist())]


@torch.compiler.disable  # it reads lengths: compiled, it would be for these alone
def packed_sdpa(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    cu_seq_lens_q,
    scaling=None,
    is_causal=None,
    **kwargs,
):
    """Attend within each segment of a packed row, by one SDPA call for neighbours of one length.

    query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim); `cu_seq_lens_q` on
    the CPU says where segments begin and end. Returns (1, T, heads, head_dim). Stock sdpa would
    build a T x T mask for the same result.
    """
    # Such as the frames of a video, all of one length.
    runs = [(length, len(list(run))) for length, run in groupby(segment_lengths(cu_seq_lens_q))]
    num_rows = [length * count for length, count in runs]
    is_causal = module.is_causal if is_causal is None else is_causal
    # Under autocast the rotary embedding leaves queries and keys in fp32, values in bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.is_cuda and query.dtype == torch.float32:
        # No fused kernel takes fp32 with fewer heads of keys (pytorch/pytorch#181528).
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        is_grouped = False
    outputs = []
    rows = zip(*(x.squeeze(0).split(num_rows, dim=1) for x in (query, key, value)))
    for (length, count), qkv in zip(runs, rows):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        output = F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scaling, enable_gqa=is_grouped
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output[None], None


def packed_varlen(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    cu_seq_lens_q,
    max_length_q,
    scaling=None,
    is_causal=None,
    **kwargs,
):
    """Do what packed_sdpa does in one call, whatever the lengths are, in bf16 on a GPU.

    `cu_seq_lens_q` is on the device; `max_length_q` is the longest segment.
    """
    is_causal = module.is_causal if is_causal is None else is_causal
    query, key, value = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    # As wide as the longest segment, a window changes nothing; but with none, torch 2.14 takes
    # cuDNN on 9.0 and 10.0 (_can_use_cudnn in torch/nn/attention/varlen.py).
    window = (-1, 0) if is_causal else (max_length_q, max_length_q)
    output = varlen_attn(
        query,
        key,
        value,
        *(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q),
        scale=scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


PACKED = {"packed_sdpa": packed_sdpa, "packed_varlen": packed_varlen}
# What their names end in in the vision tower; "flash" in it matters.
WHOLE_ROWS = "_like_flash"


def register_attention(attention: str) -> None:
    """Make `attention` known to transformers where it is ours, and keep PyTorch's from cuDNN.

    On 9.0 and 10.0 scaled_dot_product_attention prefers cuDNN's, which builds a plan for every new
    pair of batch size and length: for packed rows nearly always, and for each token of an answer.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if attention in PACKED:
        for name in (attention, attention + WHOLE_ROWS):
            transformers.AttentionInterface.register(name, PACKED[attention])


def hand_over_whole_rows(visual) -> None:
    """Let the vision tower hand our attention a whole row with its segment ends, as the LLM does.

    transformers 5.23 does so where it reads "flash" in the name of the attention, and else hands
    over one segment after the other: thousands of operations for a video. The model itself must
    not have such a name: transformers would look for the package flash-attn.
    """
    config = copy(visual.config)  # else models made from this one would look for it too
    config._attn_implementation += WHOLE_ROWS
    for module in visual.modules():
        if hasattr(module, "is_causal"):
            module.config = config
