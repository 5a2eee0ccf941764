"""Scores of answers that have a reference; the same for tests, comparison and training."""

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from util.config import UserError

# function(answer, reference) -> a number; higher is better.
Metric = Callable[[str, str], float]


def exact_match(answer: str, reference: str) -> float:
    """Return 1.0 where the two are equal but for white space around them, else 0.0."""
    return float(answer.strip() == reference.strip())


def edit_distance(first: str, second: str) -> int:
    """Return how few characters must be inserted, deleted or replaced to make the two equal.

    Source: https://en.wikipedia.org/wiki/Levenshtein_distance, with a row computed at once:
    insertions along a row are a running minimum after the slope of 1 is taken out.
    """
    letters = np.array([ord(letter) for letter in second], dtype=np.int64)
    slope = np.arange(len(letters) + 1)
    row = slope.copy()
    for i, letter in enumerate(first):
        replaced = row[:-1] + (letters != ord(letter))
        row = np.concatenate([[i + 1], np.minimum(replaced, row[1:] + 1)])
        row = np.minimum.accumulate(row - slope) + slope
    return int(row[-1])


def character_error_rate(answer: str, reference: str) -> float:
    """Return edits per character of the reference: 0.0 is exact, long wrong answers exceed 1.0."""
    answer, reference = answer.strip(), reference.strip()
    return edit_distance(answer, reference) / max(1, len(reference))


def score_all(answers: list[str], references: list[str | None], metric: Metric | None) -> dict:
    """Return the scores over all answers that have a reference.

    `num_scored` of them; `num_exact`; `character_error_rate`, all edits divided by all reference
    characters, so that long references count for more; `metric`, the mean of the user's own. The
    last two are None where there is nothing to score.
    """
    pairs = [(a.strip(), r.strip()) for a, r in zip(answers, references) if r is not None]
    num_edits = sum(edit_distance(*pair) for pair in pairs)
    num_characters = sum(max(1, len(reference)) for _, reference in pairs)
    values = [metric(*pair) for pair in pairs] if metric else []
    return {
        "num_scored": len(pairs),
        "num_exact": int(sum(exact_match(*pair) for pair in pairs)),
        "character_error_rate": num_edits / num_characters if pairs else None,
        "metric": sum(values) / len(values) if values else None,
    }


@functools.cache  # with what its function remembers
def load_metric(name: str | None) -> Metric | None:
    """Return the function that `--metric path.py:function` names, checked on every call.

    Raises UserError where there is none, and where a call fails or returns no finite number.
    """
    if name is None:
        return None
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"--metric {name}: must be path.py:function, and the file must exist")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file does as it is imported
        raise UserError(f"--metric {name}: {path} fails: {error!r}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"--metric {name}: {path} has no function {attribute!r}")

    @functools.cache  # it may be slow, such as a request to a model that judges
    def metric(answer: str, reference: str) -> float:
        try:
            value = float(function(answer, reference))
        except (Exception, SystemExit) as error:
            raise UserError(f"--metric {name}: {error!r} on reference {reference!r}") from error
        if not math.isfinite(value):
            raise UserError(f"--metric {name}: returned {value} on reference {reference!r}")
        return value

    return metric
