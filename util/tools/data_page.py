"""The page of check_data.py: samples as the model gets them, and all that is wrong."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from util.config import make_visible
from util.data.conversation import media_of
from util.data.files import Records
from util.data.index import Index
from util.data.sample import IGNORE, Sample, SampleEncoder
from util.data.workers import run_all
from util.media.source import describe
from util.model.families import read_boxes
from util.tools.page import MAX_MEDIA_BYTES, picture_uri, render_page, write_page
from util.vision_util import probe_media, unpatchify

MAX_PICTURE_SIDE = 1280  # pixels; what the model gets is rarely larger
MAX_STEPS_SHOWN = 24  # of a clip; a step is two frames
MAX_RECORD = 1000  # characters that are shown of a bad record
# Tokens that are not text, shown small: the beginning of a turn with its role, and all others.
SPECIAL = re.compile(r"(<\|im_start\|>\w*\n?|<\|\w+\|>)")
LEFT_OUT = f"left out: the page holds {MAX_MEDIA_BYTES >> 20} MiB of pictures"
MAX_BARS = 20


@dataclass
class CheckedFiles:
    """Data files, what is known of them, what is wrong, and the cards that the page shows."""

    records: Records
    index: Index
    problems: list[str]
    cards: list[dict]


def token_runs(encoder: SampleEncoder, sample: Sample) -> Iterator[tuple[torch.Tensor, int, bool]]:
    """Yield a sample in runs (ids, media type as in `token_types`, is trained) of like tokens."""
    media = encoder.token_types(sample.input_ids)
    trained = sample.labels != IGNORE
    kinds = torch.stack([media, trained])
    starts = (kinds[:, 1:] != kinds[:, :-1]).any(0).nonzero()[:, 0] + 1
    for run in torch.arange(len(media)).tensor_split(starts):
        yield sample.input_ids[run], int(media[run[0]]), bool(trained[run[0]])


def make_cards(
    records: Records, problems: list[str], encoder: SampleEncoder, most: int
) -> tuple[list[dict], list[str]]:
    """Return cards of the first `most` samples and of every bad one; and problems found anew."""
    bad = _by_number(records, problems)
    found, cards, num_bytes, num_left_out = [], {}, 0, 0
    good = np.array([i for i in range(min(most, len(records))) if i not in bad])
    for i, card in run_all(_make_card, "page", good, records, encoder):
        if isinstance(card, str):
            bad[i] = card
            found.append(f"{records.where(i)}: {card}")
            continue
        for shown in [step for item in card["media"] for step in item["steps"]]:
            num_bytes += len(shown["uri"])
            if num_bytes > MAX_MEDIA_BYTES:
                shown["uri"], num_left_out = None, num_left_out + 1
        cards[i] = card
    if num_left_out:
        print(f"warning: {num_left_out:,} pictures are {LEFT_OUT}. Lower --page_samples")
    for i, problem in bad.items():
        cards[i] = {"problem": make_visible(problem), "record": _show_record(records, i)}
    for i, card in cards.items():
        card |= {"number": i, "where": records.where(i)}
    return [cards[i] for i in sorted(cards)], found


def _by_number(records: Records, problems: list[str]) -> dict[int, str]:
    """Return what is wrong with each bad sample, by its number."""
    places = {f"{records.where(i)}: ": i for i in range(len(records))} if problems else {}
    bad = {}
    for problem in problems:
        ends = (match.end() for match in re.finditer(": ", problem))
        end = next(end for end in ends if problem[:end] in places)
        bad[places[problem[:end]]] = problem[end:]
    return bad


def _show_record(records: Records, i: int) -> str:
    try:
        text = json.dumps(records[i], ensure_ascii=False, default=describe)
    except ValueError:  # the problem says so
        return ""
    text = re.sub(r'("data:.{50})[^"]*', r"\1...", text)
    return make_visible(text[:MAX_RECORD] + ("..." if len(text) > MAX_RECORD else ""))


def _make_card(encoder: SampleEncoder, records: Records, i: int) -> dict | str:
    """Return a sample as the template wants it, from what the model gets; or what is wrong."""
    try:
        sample = encoder.encode(records[i], records.folder(i))
        items = [item for _, item in media_of(encoder.prepare(records[i], records.folder(i)))]
        shapes = [probe_media(item, encoder.policy) for item in items]
    except ValueError as error:
        return str(error)
    media = [
        _show_media(item, patches, grid, shape.metadata, encoder.policy)
        for item, shape, (_, grid, patches) in zip(items, shapes, sample.media())
    ]
    types = encoder.token_types(sample.input_ids)
    return {
        "problem": None,
        "num_trained": int((sample.labels != IGNORE).sum()),
        "num_tokens": len(types),
        "num_media_tokens": [int((types == kind).sum()) for kind in (1, 2)],
        "turns": _show_conversation(encoder, sample, media),
        "media": media,
    }


def _show_media(item: dict, patches: torch.Tensor, grid: tuple, metadata, policy) -> dict:
    """Return a picture or clip, put together again from its patches.

    `steps`: what becomes tokens together, a picture or two frames; `times` in seconds.
    """
    frames, depth = unpatchify(patches, grid, policy), policy.temporal_patch_size
    steps = []
    for k in range(0, grid[0], -(-grid[0] // MAX_STEPS_SHOWN)):
        if metadata is None:
            steps.append({"uri": picture_uri(frames[:1], MAX_PICTURE_SIDE), "times": []})
            break
        numbers = metadata.frames_indices[k * depth : (k + 1) * depth]
        times = [number / metadata.fps for number in numbers]
        steps.append({"uri": picture_uri(frames[k * depth : (k + 1) * depth]), "times": times})
    return {
        "type": item["type"],
        "name": describe(item[item["type"]]),
        "size": tuple(frames.shape[-2:]),
        "num_frames": len(metadata.frames_indices) if metadata else 1,
        "num_steps": grid[0],
        "num_tokens": policy.num_tokens((1, *grid[1:])),
        "steps": steps,
        "boxes": [],
        "note": "",
    }


def _show_conversation(
    encoder: SampleEncoder, sample: Sample, media: list[dict]
) -> list[list[tuple[str, str, bool]]]:
    """Return the turns, of pieces (text, kind, is trained), as `input_ids` and `labels` have them.

    The boxes in a piece go to the pictures before it: no notation tells which of several it is.
    """
    images = iter([item for item in media if item["type"] == "image"])
    turns, before, is_answered = [[]], [], False
    for ids, media_type, is_trained in token_runs(encoder, sample):
        text = encoder.tokenizer.decode(ids[:1] if media_type else ids)
        if media_type:
            turns[-1].append((f"{text} x {len(ids)}", "placeholder", False))
            if media_type == 1:
                before = [] if is_answered else before
                before.append(next(images))
                is_answered = False
            continue
        for item in before:
            boxes = read_boxes(text, item["size"], encoder.model_type)
            item["boxes"] += [_show_box(name, box, is_trained) for name, box in boxes]
            if boxes and len(before) > 1:
                item["note"] = "No notation tells which picture a box is in: all have all boxes"
        is_answered |= is_trained
        for k, part in enumerate(SPECIAL.split(text)):
            if part.startswith("<|im_start|>") and turns[-1]:
                turns.append([])
            if part:
                turns[-1].append((make_visible(part), "special" if k % 2 else "", is_trained))
    return turns


def _show_box(name: str, box: list[float], is_trained: bool) -> dict:
    """Return a box or point as the template draws it; `place`: x, y, width, height."""
    x1, y1, x2, y2 = box if len(box) == 4 else box * 2
    place = (min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1))
    kind = "trained" if is_trained else "given"
    return {
        "name": make_visible(name),
        "place": [f"{100 * value:.2f}%" for value in place],
        "kind": kind if x1 <= x2 and y1 <= y2 and 0 <= min(box) <= max(box) <= 1 else "wrong",
        "is_point": len(box) == 2,
    }


def _draw_lengths(lengths: np.ndarray, capacity: int) -> dict | None:
    """Return the histogram of lengths as the template draws it, None where there are none.

    `width` and `height` of the drawing area; `bars`: (x, y, width, height, count); `x_ticks`:
    (position, label); `limit`: where `capacity` is, None where no sample is longer.
    """
    if not len(lengths):
        return None
    width, height = 400, 120
    counts, edges = np.histogram(lengths, bins=min(MAX_BARS, len(np.unique(lengths))))
    step, span = width / len(counts), edges[-1] - edges[0]
    heights = np.ceil(height * counts / counts.max()).tolist()
    return {
        "width": width,
        "height": height,
        "bars": [
            (k * step + 1, height - high, step - 2, high, count)
            for k, (high, count) in enumerate(zip(heights, counts.tolist()))
        ],
        "x_ticks": [(width * k / 4, f"{edges[0] + span * k / 4:,.0f}") for k in range(5)],
        "limit": width * (capacity - edges[0]) / span if lengths.max() > capacity else None,
    }


def write_data_page(path: str, checked: list[CheckedFiles], subtitle: str, capacity: int) -> None:
    """Write the page of the files that were checked; `capacity`: tokens that a sample may have."""
    kinds = ("num_tokens", "num_supervised_tokens", "num_image_tokens", "num_video_tokens")
    totals = {kind: sum(int(getattr(part.index, kind).sum()) for part in checked) for kind in kinds}
    lengths = np.concatenate([part.index.num_tokens for part in checked])
    lengths = lengths[lengths > 0]
    long = 2 * np.median(lengths) if len(lengths) else 0
    cards = [card for part in checked for card in part.cards]
    for part in checked:
        for card in part.cards:
            num_tokens = int(part.index.num_tokens[card["number"]])
            types = {item["type"] for item in card.get("media", ())}
            groups = {"all": True, "images": "image" in types, "videos": "video" in types}
            groups |= {"long": num_tokens > long, "problems": card["problem"] is not None}
            card["groups"] = [name for name, is_in in groups.items() if is_in]
    names = ("all", "images", "videos", "long", "problems")
    files = [file.path for part in checked for file in part.records.files]
    page = render_page(
        "data_template.html",
        title=make_visible(" ".join(files)),
        subtitle=subtitle,
        cards=cards,
        filters=[(name, sum(name in card["groups"] for card in cards)) for name in names],
        lengths=lengths,
        long=long,
        totals=totals,
        left_out=LEFT_OUT,
        chart=_draw_lengths(lengths, capacity),
    )
    write_page(path, page, f"{len(cards)} samples", files)
