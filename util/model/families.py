"""All that differs between the model families: for a new one, this is the file to edit.

What they share is read from the model's own config, processor and chat template everywhere else.
"""

import torch
import transformers
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from util.vision_util import MAX_VIDEO_TOKENS, PixelPolicy

# The model types that are trained. tests/model/test_families.py goes through all of them.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


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
        "position_ids": get_vision_position_ids(grids, merge_size),
        "cu_seqlens": get_vision_cu_seqlens(grids),
    }
    if hasattr(vision_tower, "window_size"):
        inputs["window_index"], inputs["cu_window_seqlens"] = get_vision_window_index(
            grids, merge_size, vision_tower.window_size, vision_tower.patch_size
        )
    if hasattr(vision_tower, "num_grid_per_side"):
        inputs["interp_indices"], inputs["interp_weights"] = (
            get_vision_interpolation_indices_and_weights(
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


def convert_box(
    box: list[float], size: tuple[int, int], resized: tuple[int, int], model_type: str
) -> list[int]:
    """Return a box in pixels, (x1, y1, x2, y2), in the coordinates that a family was trained on.

    `size` is the (height, width) of the picture as it is shown, `resized` what
    `PixelPolicy.image_size` makes of it, `model_type` that of the model's config: qwen2_vl and
    qwen3_vl count thousandths of the picture, qwen2_5_vl pixels of the resized picture. Points,
    (x, y), convert alike. Sources: the Qwen2-VL report, arXiv 2409.12191 (normalized to 1000);
    the Qwen2.5-VL report, arXiv 2502.13923 (absolute); 2d_grounding.ipynb of QwenLM/Qwen3-VL.
    """
    scales = {"qwen2_vl": (1000, 1000), "qwen3_vl": (1000, 1000), "qwen2_5_vl": resized}
    if model_type not in scales:
        raise ValueError(f"boxes of {model_type} are not known: use one of {', '.join(scales)}")
    (height, width), (to_height, to_width) = size, scales[model_type]
    converted = []
    for i, value in enumerate(box):
        old, new = (height, to_height) if i % 2 else (width, to_width)
        converted.append(round(min(max(value, 0), old) / old * new))
    return converted
