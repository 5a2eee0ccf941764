"""All that differs between the model families: for a new one, this is the file to edit.

What they share is read from the model's own config, processor and chat template everywhere else.
"""

import functools
import json
import re

import torch
import transformers
from transformers import vision_utils
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from util.config import logger
from util.data.boxes import Box
from util.model.attention import segment_lengths
from util.vision_util import MAX_VIDEO_TOKENS, PixelPolicy

# Boxes in a text: a name for those that follow, a box between tokens, an object of JSON, or, where
# boxes are JSON, a list of four alone.
WRITTEN_BOX = re.compile(
    r"<\|object_ref_start\|>(?P<name>(?:[^<]|<(?!\|))*)<\|object_ref_end\|>"
    r"|<\|box_start\|>(?P<tokens>[^<]*)<\|box_end\|>"
    r"|\{(?P<json>[^{}]*_2d\b[^{}]*)\}|\[(?P<list>\d+(?:,\s*\d+){3})\]"
)

# The model types that are trained. tests/model/test_families.py goes through all of them.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")

# Weights in a checkpoint that transformers does not load, by how their names begin. They are saved
# as they came. Qwen3.5: the layers that draft tokens ahead, for servers.
UNREAD = {"qwen3_5": "mtp."}

# What Qwen2-VL to Qwen3.8 add to the vocabulary: for chats, media, boxes, code, tools, sound.
OWN_TOKENS = re.compile(
    r"<\|(endoftext|(im|object_ref|box|quad|vision|audio)_(start|end)"
    r"|(vision|image|video|audio|fim)_pad|fim_(prefix|middle|suffix)|repo_name|file_sep)\|>"
    r"|</?(think|tool_call|tool_response)>|<tts_(pad|text_bos|text_eod|text_bos_single)>"
)


def added_by_users(tokenizer) -> list[str]:
    """Return the tokens that somebody has added to the vocabulary of a family."""
    return [t for t in tokenizer.get_added_vocab() if not OWN_TOKENS.fullmatch(t)]


def why_not_trained(model_config) -> str | None:
    """Return why a model cannot be trained here, None where it can."""
    if model_config.model_type not in FAMILIES:
        return f"is of type {model_config.model_type}; use one of {', '.join(FAMILIES)}"
    if "sliding_attention" in getattr(model_config.text_config, "layer_types", []):
        return "its config.json asks for sliding attention: not supported"
    return None


def part_of(name: str) -> str:
    """Return which of --train's parts a parameter belongs to: llm, vision or merger."""
    if not name.startswith("model.visual."):
        return "llm"
    # Qwen3-VL's deepstack_merger_list merges too.
    return "merger" if "merger" in name else "vision"


def layers_of(model) -> tuple[list, list]:
    """Return the blocks of the vision tower and the decoder layers: what shards are made of."""
    return list(model.model.visual.blocks), list(model.model.language_model.layers)


class PackedDeltaNet(Qwen3_5GatedDeltaNet):
    """Qwen3.5's linear attention within the segments of a packed row.

    Its convolution and its state run over a whole row: transformers 5.23 keeps samples apart in the
    recurrence alone, and only with flash-linear-attention. Weights and names stay as they are.
    """

    @torch.compiler.disable  # it reads lengths: compiled, it would be for these alone
    def forward(self, hidden_states, cu_seq_lens_q=None, cu_seq_lens_cpu=None, **kwargs):
        """Return (1, T, hidden_size); `cu_seq_lens_cpu` says where segments begin and end."""
        forward = super().forward
        if cu_seq_lens_cpu is None:  # generation: rows of their own, and a cache
            return forward(hidden_states, **kwargs)
        if hidden_states.is_cuda and delta_net_kernels():
            return self.forward_by_kernels(hidden_states, cu_seq_lens_q, cu_seq_lens_cpu)
        segments = hidden_states.split(segment_lengths(cu_seq_lens_cpu), dim=1)
        return torch.cat([forward(segment) for segment in segments], dim=1)

    def forward_by_kernels(self, hidden_states, cu_seq_lens_q, cu_seq_lens_cpu):
        """Do the same by flash-linear-attention: a whole row at once."""
        convolve, delta_rule = delta_net_kernels()
        # `to` of a tensor that stays on the CPU would leave it there.
        ends = torch.Tensor.to(cu_seq_lens_q, hidden_states.device, non_blocking=True)
        ends = {"cu_seqlens": ends, "cu_seqlens_cpu": cu_seq_lens_cpu}
        mixed, gates = self.in_proj_qkv(hidden_states), self.in_proj_z(hidden_states)
        weight = self.conv1d.weight.squeeze(1).to(mixed.dtype)
        mixed, _ = convolve(mixed, weight, activation=self.activation, **ends)
        mixed = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        widths = (self.head_k_dim, self.head_k_dim, self.head_v_dim)
        query, key, value = (x.unflatten(-1, (-1, width)) for x, width in zip(mixed, widths))
        rates = self.in_proj_a(hidden_states).float() + self.dt_bias
        values, _ = delta_rule(
            query,
            key,
            value,
            g=-self.A_log.float().exp() * torch.nn.functional.softplus(rates),
            beta=self.in_proj_b(hidden_states).sigmoid(),
            use_qk_l2norm_in_kernel=True,
            **ends,
        )
        gates = gates.reshape(-1, self.head_v_dim)
        values = self.norm(values.reshape(-1, self.head_v_dim), gates)
        return self.out_proj(values.reshape(*hidden_states.shape[:2], -1))


@functools.cache
def delta_net_kernels() -> tuple | None:
    """Return flash-linear-attention's convolution and delta rule; say it once if they are missing.

    It is a package of Python alone. Without it, results are the same.
    """
    try:
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        logger.warning(
            f"flash-linear-attention cannot be used ({error}): linear attention takes one sample "
            "of a packed row after the other, in plain PyTorch. Steps are slower and take more "
            "memory; results are the same. pip install flash-linear-attention"
        )
        return None
    return causal_conv1d, chunk_gated_delta_rule


def keep_samples_apart(model) -> None:
    """Let a model's linear attention, if it has any, heed where segments of a row end."""
    for layer in model.modules():
        if isinstance(layer, Qwen3_5GatedDeltaNet):
            layer.__class__ = PackedDeltaNet


def state_size(layers: list) -> int:
    """Return the numbers in the states of linear attention, over all decoder layers."""
    nets = [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]
    return sum(net.num_v_heads * net.head_k_dim * net.head_v_dim for net in nets)


def vision_width(vision_config) -> int:
    """Return the values that the vision tower keeps for a patch; Qwen2-VL names it otherwise."""
    return getattr(vision_config, "embed_dim", vision_config.hidden_size)


def set_pixel_limits(processor, policy: PixelPolicy) -> None:
    """Write the limits of a run into a processor, as those who load it later will read them."""
    processor.image_processor.size = {
        "shortest_edge": policy.min_pixels,
        "longest_edge": policy.max_pixels,
    }
    video_processor = processor.video_processor
    video_processor.fps = policy.video_fps
    video_processor.max_frames = policy.video_max_frames
    # Without it, limits hold for single frames but not for long clips.
    video_processor.cap_pixels_per_frame = True
    largest, max_tokens = policy.video_max_pixels, MAX_VIDEO_TOKENS
    if isinstance(video_processor, transformers.Qwen3VLVideoProcessor):
        # It has the two the other way round: pixels of the clip, tokens of a frame. And it does
        # not enlarge frames that are smaller than the smallest, where training does.
        largest, max_tokens = policy.video_total_pixels, largest / policy.factor**2
    video_processor.size = {"shortest_edge": policy.video_min_pixels, "longest_edge": largest}
    video_processor.max_video_tokens = max_tokens


def vision_inputs(grids: torch.Tensor, vision_tower) -> dict[str, torch.Tensor]:
    """Return what a vision tower computes of patch grids (num_media, 3), by its names for it.

    position_ids (num_patches, 2) int64; cu_seqlens int32: where frames begin and end. Qwen2.5-VL:
    window_index (num_tokens,) int64, an order of windows, cu_window_seqlens int32. Qwen3-VL:
    interp_indices int64 and interp_weights (num_patches, 4), into its table of positions.
    """
    merge_size = vision_tower.spatial_merge_size
    inputs = {
        "position_ids": vision_utils.get_vision_position_ids(grids, merge_size),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grids),
    }
    if hasattr(vision_tower, "window_size"):
        inputs["window_index"], inputs["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grids, merge_size, vision_tower.window_size, vision_tower.patch_size
        )
    if hasattr(vision_tower, "num_grid_per_side"):
        inputs["interp_indices"], inputs["interp_weights"] = (
            vision_utils.get_vision_interpolation_indices_and_weights(
                grids,
                vision_tower.num_grid_per_side,
                vision_tower.interpolation_mode,
                vision_tower.interpolation_align_corners,
                merge_size,
            )
        )
    return inputs


def adds_features_in_layers(model) -> bool:
    """Return whether decoder layers too are given features of pictures, as Qwen3-VL's are."""
    return hasattr(model.config.vision_config, "deepstack_visual_indexes")


def takes_seconds_per_grid(processor) -> bool:
    """Return whether generation is told the time between frames; Qwen3-VL reads it in the text."""
    return "second_per_grid_ts" in processor.model_input_names


def _box_scale(resized: tuple[int, int], model_type: str) -> tuple[int, int]:
    """Return the (height, width) of a picture in the units in which a family counts boxes."""
    if model_type not in FAMILIES:
        raise ValueError(f"boxes of {model_type} are not known: use one of {', '.join(FAMILIES)}")
    return resized if model_type == "qwen2_5_vl" else (1000, 1000)


def convert_box(
    box: list[float], size: tuple[int, int], resized: tuple[int, int], model_type: str
) -> list[int]:
    """Return a box in pixels, (x1, y1, x2, y2), in the coordinates that a family was trained on.

    `size` is the (height, width) of the picture as it is shown, `resized` what
    `PixelPolicy.image_size` makes of it, `model_type` that of the model's config: qwen2_5_vl counts
    pixels of the resized picture, the others thousandths of the picture. Points, (x, y), convert
    alike. Sources: the Qwen2-VL report, arXiv 2409.12191 (normalized to 1000); the Qwen2.5-VL
    report, arXiv 2502.13923 (absolute); 2d_grounding.ipynb of QwenLM/Qwen3-VL; for Qwen3.5, issue 4
    of QwenLM/Qwen3.8-Flash-Next (still relative, to 1000).
    """
    (height, width), (to_height, to_width) = size, _box_scale(resized, model_type)
    converted = []
    for i, value in enumerate(box):
        old, new = (height, to_height) if i % 2 else (width, to_width)
        converted.append(round(min(max(value, 0), old) / old * new))
    return converted


def write_boxes(name: str | None, boxes: list[Box], model_type: str) -> str:
    """Return boxes, and the name that they belong to, if any, as a family was trained to write.

    Qwen2-VL: between tokens of their own (arXiv 2409.12191, section 2.2). The others: a JSON list,
    or with a name, an object {"bbox_2d": [x1, y1, x2, y2], "label": name} for each box, point_2d
    for a point (cookbooks/spatial_understanding.ipynb of QwenLM/Qwen2.5-VL, 2d_grounding.ipynb of
    QwenLM/Qwen3-VL). Numbers are those of `convert_box`.
    """
    numbers = [convert_box(box.values, box.size, box.resized, model_type) for box in boxes]
    if model_type == "qwen2_vl":
        text = "" if name is None else f"<|object_ref_start|>{name}<|object_ref_end|>"
        for box in numbers:
            points = ",".join(f"({x},{y})" for x, y in zip(box[::2], box[1::2]))
            text += f"<|box_start|>{points}<|box_end|>"
        return text
    if not boxes:
        return name
    if name is None:
        return json.dumps(numbers[0])
    keys = ["bbox_2d" if len(box) == 4 else "point_2d" for box in numbers]
    rows = [{key: box, "label": name} for key, box in zip(keys, numbers)]
    return ", ".join(json.dumps(row, ensure_ascii=False) for row in rows)


def read_boxes(
    text: str, resized: tuple[int, int], model_type: str
) -> list[tuple[str, list[float]]]:
    """Return the (name, box) of every box in a text, as shares of the picture.

    A box is x1, y1, x2, y2, a point x, y, in the units of `convert_box`; they are as they stand:
    out of 0 to 1 where they leave the picture. What `write_boxes` writes for one family is read for
    all: data can be written for another one. Raises ValueError where the units are not known.
    """
    boxes, name, end = [], "", 0
    for match in WRITTEN_BOX.finditer(text):
        kind, found = match.lastgroup, match[match.lastgroup]
        name = name if match.start() == end else ""  # several boxes can follow one name
        end = match.end()
        if kind == "name":
            name = found
        if kind == "json":
            label = re.search(r"""["']label["']\s*:\s*(["'])((?:\\.|(?!\1).)*)""", found)
            name = label[2] if label else ""
            found = re.search(r"(?:bbox|point)_2d\W*\[([^]]*)|$", found)[1] or ""
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", found)]
        is_box = kind in ("tokens", "json") or (kind == "list" and model_type != "qwen2_vl")
        if is_box and len(numbers) in (2, 4):
            height, width = _box_scale(resized, model_type)
            boxes.append((name, [n / (height if i % 2 else width) for i, n in enumerate(numbers)]))
    return boxes
