"""Compare the answers of two models: one HTML page that opens anywhere, without network.

    python test_on_official_model.py --save base.json
    python test_on_trained_model_by_us.py --save trained.json
    python compare.py base.json trained.json --output compare.html

Nothing is generated here. Pictures and clips are looked for from the current folder, else from
the folder of the answers.
"""

import argparse
import json
import math
import os
from itertools import zip_longest
from pathlib import Path

from util.config import UserError, make_visible
from util.data.conversation import media_of, parse_conversation, text_of
from util.run import run_main
from util.tools.page import draw_curves, embed, mark_differences, render_page, write_page
from util.tools.scores import Metric, character_error_rate, exact_match, load_metric, score_all

MAX_TEXT = 100_000  # characters; to compare two such texts takes two minutes


def load_answers(path: str) -> dict:
    """Return what `--save` wrote to the file `path`. Raises UserError where it is anything else."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        rows, metrics = saved["answers"], saved.get("metrics")
        if not isinstance(metrics, str | None):
            raise ValueError("metrics must be a path, or null")
        if not rows:
            raise ValueError("it holds no answers")
        for row in rows:
            row["messages"] = parse_conversation(row)
            texts = [row["id"], row["answer"], row["reference"]]
            if not all(isinstance(text, str) for text in texts[: 2 if texts[2] is None else 3]):
                raise ValueError("id, answer and reference must be strings")
            if any(len(text or "") > MAX_TEXT for text in texts):
                raise ValueError(f"id, answer or reference is over {MAX_TEXT:,} characters")
            row["seconds"] = float(row["seconds"])
            if not math.isfinite(row["seconds"]):
                raise ValueError("seconds must be a finite number")
        return {
            "path": path,
            "model": make_visible(str(saved["model"])),
            "settings": {
                make_visible(str(name)): make_visible(str(value))
                for name, value in saved["settings"].items()
            },
            "metrics": metrics,
            "answers": rows,
        }
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever the file of someone else holds
        raise UserError(
            f"{path}: is not a file that --save of the test scripts wrote: {error!r}"
        ) from error


def check_same_prompts(files: list[dict]) -> None:
    """Raise UserError naming the prompts that are not the same in both files."""
    different = []
    for i, rows in enumerate(zip_longest(*(file["answers"] for file in files))):
        asked = [row and (row["id"], row["messages"], row["reference"]) for row in rows]
        if asked[0] != asked[1]:
            names = [row["id"] if row else "nothing" for row in rows]
            names = names[:1] if names[0] == names[1] else names
            different.append(f"number {i} ({' against '.join(names)})")
    if different:
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise UserError(
            f"{files[0]['path']} and {files[1]['path']} answer different prompts: "
            f"{', '.join(different[:5])}{more}. Answer the same --prompts with both models"
        )


def compare_prompt(
    rows: list[dict], folder: Path, metric: Metric | None, clip_sizes: list[int]
) -> dict:
    """Return one prompt with both answers and their scores, as the template wants it.

    clip_sizes: see `embed`.
    """
    reference, texts = rows[0]["reference"], [row["answer"] for row in rows]
    answers = []
    for row, pieces in zip(rows, mark_differences(*texts)):
        answer = {"pieces": pieces, "is_scored": reference is not None}
        if reference is not None:
            answer["is_exact"] = bool(exact_match(row["answer"], reference))
            answer["error_rate"] = character_error_rate(row["answer"], reference)
            answer["metric"] = metric(row["answer"], reference) if metric else None
            answer["rank"] = answer["metric"] if metric else -answer["error_rate"]
        answers.append(answer)
    verdict = "unchanged" if texts[0] == texts[1] else "changed"
    groups = ["all", verdict]
    if reference is not None and answers[0]["rank"] != answers[1]["rank"]:
        verdict = "better" if answers[1]["rank"] > answers[0]["rank"] else "worse"
        groups.append(verdict)
    return {
        "id": make_visible(rows[0]["id"]),
        "turns": [(m["role"], make_visible(text_of(m))) for m in rows[0]["messages"]],
        "media": [embed(item, folder, clip_sizes) for _, item in media_of(rows[0]["messages"])],
        "reference": reference and make_visible(reference),
        "answers": answers,
        "verdict": verdict,
        "groups": groups,
    }


def render(files: list[dict], metric: Metric | None) -> str:
    """Return the page."""
    folder = Path(files[0]["path"]).parent
    pairs, clip_sizes = zip(*(file["answers"] for file in files)), []
    prompts = [compare_prompt(pair, folder, metric, clip_sizes) for pair in pairs]
    for file in files:
        answers = [row["answer"] for row in file["answers"]]
        references = [row["reference"] for row in file["answers"]]
        file["scores"] = score_all(answers, references, metric)
        file["seconds"] = sum(row["seconds"] for row in file["answers"]) / len(answers)
    settings = []
    for name in dict.fromkeys([*files[0]["settings"], *files[1]["settings"]]):
        values = [file["settings"].get(name, "") for file in files]
        settings.append({"name": name, "values": values, "differs": values[0] != values[1]})
    names = ("all", "changed", "better", "worse")
    filters = [(name, sum(name in prompt["groups"] for prompt in prompts)) for name in names]
    return render_page(
        "compare_template.html",
        files=files,
        prompts=prompts,
        settings=settings,
        filters=filters,
        chart=draw_curves(files),
        has_metric=metric is not None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("first", help="answers of the base model, written by --save")
    parser.add_argument("second", help="answers of the trained model, written by --save")
    parser.add_argument("--output", default="compare.html", help="the page to write")
    parser.add_argument(
        "--metric",
        metavar="FILE.py:FUNCTION",
        help="your own score, function(answer, reference), higher is better; it decides what "
        "is better and worse in place of the character error rate",
    )
    arguments = parser.parse_args()
    metric = load_metric(arguments.metric)
    files = [load_answers(arguments.first), load_answers(arguments.second)]
    check_same_prompts(files)
    for file, other in zip(files, reversed(files)):
        stem, other_stem = Path(file["path"]).stem, Path(other["path"]).stem
        file["label"] = stem if stem != other_stem else os.path.splitext(file["path"])[0]
    contents = f"{len(files[0]['answers'])} prompts"
    page = render(files, metric)
    write_page(arguments.output, page, contents, [file["path"] for file in files])


if __name__ == "__main__":
    run_main(main)
