"""All that differs between the model families."""

# Model types that this repo trains; tests/test_families.py holds what differs between them.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


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


def part_of(name: str) -> str:
    """Return which of --train's parts a parameter belongs to: llm, vision or merger."""
    if not name.startswith("model.visual."):
        return "llm"
    # Qwen3-VL's deepstack_merger_list merges too.
    return "merger" if "merger" in name else "vision"
