"""Writes the table of options in configuration.md from RLRConfig itself: `python docs/options.py`."""

import dataclasses
from pathlib import Path

from transformers import TrainingArguments

from rlr_trainer import RLRConfig

PAGE = Path(__file__).parent / "configuration.md"
START, END = "<!-- options: made by docs/options.py -->\n", "<!-- end of options -->\n"


def table() -> str:
    """One row per option that RLRConfig adds or whose default it changes."""
    base = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(RLRConfig):
        if field.name in base and base[field.name].metadata == field.metadata:
            continue
        default = "" if field.default is None else f"`{field.default!r}`"
        rows.append(f"| `{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(START)
    PAGE.write_text(before + START + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
