"""The shape of the RLR paper's tables, on the bundled models: `python benchmarks/paper_table.py` writes docs/paper_table.md from the results.

The runs are those of the benchmark (`benchmarks/driver.py`). Every cell is the end of runs of equal length.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.analysis import score_cell
from benchmarks.driver import CLIP_RATE, RESULTS, TUNING_SEED
from benchmarks.write_report import write_between

START = "<!-- results: made by benchmarks/paper_table.py -->\n"
PAGE = Path(__file__).parent.parent / "docs" / "paper_table.md"
PAPER = [  # rows of the paper's ablation: name, method; without both it is DRaFT-1, bit for bit
    ("RLR as in the paper", "rlr_paper"),
    ("RLR without ZO", "rlr_paper_without_zo"),
    ("RLR without HO", "rlr_paper_without_ho"),
    ("RLR without both (DRaFT-1, bit for bit)", "draft"),
]
OURS = [("our default with the reward's gradient", "rlr"), ("our default for black boxes", "rlr_black_box")]
# model -> rows (name, method, learning rate)
ROWS: dict[str, list[tuple[str, str, float]]] = {
    "digits": [
        ("DDPO (TRL's)", "trl_ddpo", 5e-3),
        ("AlignProp (TRL's)", "trl_alignprop", 1e-2),
        ("DRaFT-1", "draft", 5e-3),
        *((name, method, 5e-3) for name, method in PAPER + OURS),
    ],
    "moving-digits": [
        ("DDPO", "ddpo", CLIP_RATE),
        ("DRaFT-1", "draft", CLIP_RATE),
        ("as VADER: DRaFT-1 on 3 random frames", "vader", CLIP_RATE),
        *((name, method, CLIP_RATE) for name, method in PAPER + OURS),
    ],
}
# model -> columns (title, task, number); a method without the reward's gradient is found under BLACK_BOX
COLUMNS = {
    "digits": [
        ("digit: reward", "digit", "reward"),
        ("judge", "digit", "judge"),
        ("Frechet", "digit", "frechet"),
        ("ink: reward", "ink", "reward"),
        ("judge's confidence", "ink", "judge"),
        ("digit + ink: reward", "digit_and_ink", "reward"),
        ("judge", "digit_and_ink", "judge"),
    ],
    "moving-digits": [
        ("seven moving right: reward", "digit_and_direction", "reward"),
        ("judged as a seven", "digit_and_direction", "judge"),
        ("as moving right", "digit_and_direction", "direction"),
        ("frames of one digit", "digit_and_direction", "one_digit"),
        ("motion", "digit_and_direction", "motion"),
        ("diversity", "digit_and_direction", "diversity"),
        ("ink: reward", "frames_ink", "reward"),
        ("judge's confidence", "frames_ink", "judge"),
        ("motion", "frames_ink", "motion"),
    ],
}
BLACK_BOX = {"ink": "ink_black_box"}


def curves(model: str, task: str, method: str, rate: float) -> list[list[dict[str, Any]]]:
    """Curves of all reported seeds of a method; empty without a run."""
    for name in (task, BLACK_BOX.get(task, task)):
        found = [json.loads(path.read_text()) for path in sorted((RESULTS / model / name / method).glob("*.json"))]
        kept = [run for run in found if run["seed"] != TUNING_SEED and run["learning_rate"] == rate and run["batch"] == 16]
        if kept:
            return [run["curve"] for run in kept]
    return []


def table(model: str) -> list[str]:
    """The rows of one model, the base first, which is where all runs begin; tasks without a run have no columns."""
    found = {
        task: {method: curves(model, task, method, rate) for _, method, rate in ROWS[model]}
        for task in dict.fromkeys(task for _, task, _ in COLUMNS[model])
    }
    found = {task: of_methods for task, of_methods in found.items() if any(of_methods.values())}
    columns = [column for column in COLUMNS[model] if column[1] in found]
    lines = [f"| | rate | seeds | {' | '.join(title for title, _, _ in columns)} |", "|---" * (len(columns) + 3) + "|"]
    first = {task: next(many[0][0] for many in of_methods.values() if many) for task, of_methods in found.items()}
    lines.append("| base | | | " + " | ".join(score_cell([first[task][number]]) for _, task, number in columns) + " |")
    for name, method, rate in ROWS[model]:
        ends = {task: [curve[-1] for curve in of_methods[method]] for task, of_methods in found.items()}
        seeds = "/".join(str(len(rows)) for rows in ends.values())
        cells = [score_cell([row[number] for row in ends[task]]) for _, task, number in columns]
        lines.append(f"| {name} | {rate:g} | {seeds} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    lines: list[str] = []
    for model, title in (("digits", "Pictures"), ("moving-digits", "Clips")):
        lines += [f"### {title} ({model})", "", *table(model), ""]
    write_between(PAGE, START, "\n".join(lines))


if __name__ == "__main__":
    main()
