"""Write the tables of docs/flags.md and docs/flags.zh.md from the flags in util/config.py.

    python -m util.tools.flags

The Chinese help stands in docs/flags.zh.json, beside the English that it translates.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

from util.config import Config, UserError
from util.run import run_main

DOCS = Path(__file__).parents[2] / "docs"
# The pages have a table for each group of flags; these begin the groups.
FIRST_OF_GROUP = ("model_name_or_path", "num_epochs", "min_pixels", "max_tokens", "report_to")


def table_row(field: dataclasses.Field, help_text: str) -> str:
    """Return a flag as a row: name and choices, meaning, default."""
    types = (field.type, *get_args(field.type))  # the latter of a type such as Literal[...] | None
    choices = [choice for t in types if get_origin(t) is Literal for choice in get_args(t)]
    is_list = field.default is dataclasses.MISSING
    default = " ".join(field.default_factory()) if is_list else field.default
    flag = f"`--{field.name}` {', '.join(choices)}".strip()
    row = f"| {flag} | {help_text} | {'' if default is None else default} |\n"
    return row.replace("<", "&lt;").replace("|  |", "| |")


def fill_page(page: str, helps: dict[str, str]) -> str:
    """Return a page with a row for each flag in its tables; what is around them stays."""
    groups = []
    for field in dataclasses.fields(Config):
        groups += [""] if field.name in FIRST_OF_GROUP else []
        groups[-1] += table_row(field, helps[field.name])
    return re.sub(r"(?<=^\|---\|---\|---\|\n)(\|.*\n)*", lambda _: groups.pop(0), page, flags=re.M)


def make_pages() -> dict[Path, str]:
    """Return what both pages should be. Raises UserError where help has no translation."""
    english = {field.name: field.metadata["help"] for field in dataclasses.fields(Config)}
    pairs = json.loads((DOCS / "flags.zh.json").read_text(encoding="utf-8"))
    stale = [n for n in english | pairs if pairs.get(n, [None])[0] != english.get(n)]
    if stale:
        raise UserError(f"docs/flags.zh.json: the English help has changed of {', '.join(stale)}")
    chinese = {name: pair[1] for name, pair in pairs.items()}
    pages = {DOCS / "flags.md": english, DOCS / "flags.zh.md": chinese}
    return {p: fill_page(p.read_text(encoding="utf-8"), helps) for p, helps in pages.items()}


def main() -> None:
    for path, page in make_pages().items():
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
