"""Boxes that a record lists under "objects", written where the tags in its text stand.

As ms-swift has them: "ref" are names, which take the place of <ref-object>; "bbox" are boxes
(x1, y1, x2, y2) or points (x, y), which take that of <bbox>; "image_id" are the numbers of their
pictures, 0 where left out. Source: Grounding in docs/source_en/Customization/Custom-dataset.md of
modelscope/ms-swift. What is wrong raises ValueError.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from util.data.conversation import text_holders
from util.data.keys import is_empty

KEYS = ("ref", "bbox", "bbox_type", "image_id")
# The (height, width) that boxes count in, by "bbox_type"; real ones in that of their picture.
UNITS = {"real": None, "norm1": (1, 1), "norm1000": (1000, 1000)}
# What is closed, <bbox>...</bbox>, is text of another format.
BOX = r"<bbox>(?!.*</bbox>)"
# A name with the boxes that follow it directly, or a box alone.
PLACE = re.compile(f"(?s:<ref-object>(?:{BOX})*|{BOX})")
# Boxes reach out of their picture by rounding; by more than this share of it, they are wrong.
MARGIN = 0.01


@dataclass
class Box:
    """A box or point, as `util.model.families.convert_box` takes it."""

    values: list[float]
    size: tuple[int, int]  # (height, width) that it counts in
    resized: tuple[int, int]  # that to which its picture is resized


def place_boxes(messages: list[dict], objects, sizes: Callable, write: Callable) -> None:
    """Replace the tags in `messages`, in place, by what `write(name, boxes)` makes of `objects`.

    The name is None where a box stands alone. `sizes` returns, for each picture in turn, its
    (height, width) as it is shown and as it is resized.
    """
    holders = list(text_holders(messages))
    tags = "".join(tag for owner, key in holders for tag in PLACE.findall(owner[key]))
    if not tags and is_empty(objects):
        return
    objects = _check(objects)
    names, boxes = objects.get("ref", []), _read_boxes(objects, sizes)
    for tag, values in (("ref-object", names), ("bbox", boxes)):
        if (count := tags.count(f"<{tag}>")) != len(values):
            raise ValueError(
                f'<{tag}> tags in the text: {count}, but in "objects": {len(values)}. Put one tag '
                "where each belongs, or leave both out"
            )
    names, boxes = iter(names), iter(boxes)

    def replace(place: re.Match) -> str:
        name = next(names) if place[0].startswith("<ref") else None
        return write(name, [next(boxes) for _ in range(place[0].count("<bbox>"))])

    for owner, key in holders:
        owner[key] = PLACE.sub(replace, owner[key])


def _check(objects) -> dict:
    """Return what is not empty of `objects`, with keys and names as they must be."""
    if is_empty(objects):
        return {}
    if not isinstance(objects, dict):
        raise ValueError(f'"objects" must be an object with {", ".join(KEYS)}')
    objects = {key: value for key, value in objects.items() if not is_empty(value)}
    for key, value in objects.items():
        if key not in KEYS:
            raise ValueError(f'"objects" has a key {key!r}: it takes {", ".join(KEYS)}')
        if key != "bbox_type" and not isinstance(value, list):
            raise ValueError(f'"objects": "{key}" must be a list')
    for name in objects.get("ref", []):
        if not isinstance(name, str) or PLACE.search(name):
            raise ValueError(f'"objects": {name!r:.80}: a name must be text without tags')
    return objects


def _read_boxes(objects: dict, sizes: Callable) -> list[Box]:
    """Return the boxes of `objects`, checked against the pictures that they lie in."""
    values, numbers = objects.get("bbox", []), objects.get("image_id", [])
    unit = objects.get("bbox_type", "real")
    if not isinstance(unit, str) or unit not in UNITS:
        raise ValueError(f'"objects": bbox_type {unit!r}: must be one of {", ".join(UNITS)}')
    if numbers and len(numbers) != len(values):
        raise ValueError(f'"objects": {len(numbers)} image_id, but {len(values)} boxes')
    coordinates = [number for value in values if _is_box(value) for number in value]
    if unit == "real" and any(n % 1 for n in coordinates) and max(coordinates) <= 1:
        raise ValueError('"objects": boxes are shares of the picture: "bbox_type": "norm1" says so')
    shown, boxes = sizes() if values else [], []
    for value, k in zip(values, numbers or [0] * len(values)):
        if not _is_box(value):
            raise ValueError(
                f'"objects": {value!r:.80}: a box is [x1, y1, x2, y2], x1 up to x2 and y1 up to '
                "y2; a point is [x, y]"
            )
        if type(k) is not int or not 0 <= k < len(shown):
            raise ValueError(f'"objects": a box in picture {k!r}, but there are {len(shown)}')
        size = UNITS[unit] or shown[k][0]
        for i, number in enumerate(value):
            side = size[1 - i % 2]
            if not -MARGIN * side <= number <= (1 + MARGIN) * side:
                raise ValueError(
                    f'"objects": {value!r:.80}: reaches out of picture {k}, in which bbox_type '
                    f"{unit} counts to {size[1]} x {size[0]}. Is bbox_type another, or the picture?"
                )
        boxes.append(Box(value, size, shown[k][1]))
    return boxes


def _is_box(value) -> bool:
    is_right = isinstance(value, list) and len(value) in (2, 4)
    is_right = is_right and all(type(number) in (int, float) for number in value)
    return is_right and (len(value) == 2 or (value[0] <= value[2] and value[1] <= value[3]))
