"""Attention within the segments of a packed row."""

from copy import copy
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
import transformers
from transformers.utils import is_flash_attn_2_available

# The name of packed_sdpa in the vision tower; "flash" in it matters.
WHOLE_ROWS = "packed_sdpa_like_flash"


def choose_attention(device: torch.device, precision: str) -> str:
    """Return flash_attention_2 where it is installed and can run, else packed_sdpa."""
    if device.type != "cuda" or precision == "fp32" or not is_flash_attn_2_available():
        return "packed_sdpa"
    # flash-attn 2 needs Ampere or newer.
    return (
        "flash_attention_2" if torch.cuda.get_device_capability(device)[0] >= 8 else "packed_sdpa"
    )


def segment_lengths(cu_seqlens: torch.Tensor) -> list[int]:
    """Return the lengths of segments whose ends `cu_seqlens` holds, on the CPU, with a 0 before."""
    return [end - begin for begin, end in pairwise(cu_seqlens.tolist())]


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
    rows = zip(*(x[0].split(num_rows, dim=1) for x in (query, key, value)))
    for (length, count), qkv in zip(runs, rows):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        output = F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scaling, enable_gqa=is_grouped
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output[None], None


def register_attention(attention: str) -> None:
    """Make packed_sdpa known to transformers, where it is `attention`."""
    if attention == "packed_sdpa":
        for name in ("packed_sdpa", WHOLE_ROWS):
            transformers.AttentionInterface.register(name, packed_sdpa)


def hand_over_whole_rows(visual) -> None:
    """Let the vision tower hand packed_sdpa a whole row with its segment ends, as the LLM does.

    transformers 5.23 does so where it reads "flash" in the name of the attention, and else hands
    over one segment after the other: thousands of operations for a video.
    """
    config = copy(visual.config)  # else models made from this one would look for flash-attn
    config._attn_implementation = WHOLE_ROWS
    for module in visual.modules():
        if hasattr(module, "is_causal"):
            module.config = config
