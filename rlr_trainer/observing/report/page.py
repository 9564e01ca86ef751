"""Puts the page together: everything the template shows, computed here; the style goes in with its hash in the page's policy."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlr_trainer.observing.report import series
from rlr_trainer.observing.report.charts import recorded_axes, reward_figure, section_figures
from rlr_trainer.observing.report.drawing import COLOURS
from rlr_trainer.observing.report.facts import Facts, facts_of, remarks_of, reward_at
from rlr_trainer.observing.report.pictures import MOST_COLUMNS, MOST_ROWS, grid_of
from rlr_trainer.observing.report.reading import Run, as_list
from rlr_trainer.persistence.descriptions import in_words

ASSETS = Path(__file__).parent / "assets"
NAMES_OF_PLACES = {"output_dir", "logging_dir", "run_name", "overwrite"}  # differ between any two runs
# Value that may be missing -> what gives it.
MISSING = {
    "seconds": "Rewards against time: no seconds in metrics.jsonl, which runs of this version log.",
    "kl": "KL: not logged. Train with kl_coef set; 0 logs it without using it.",
    "diversity": "Diversity: not logged; runs of this version log it where two pictures share a prompt.",
}


def render(runs: list[Run], version: str) -> str:
    """The page of some runs, as HTML.

    Args:
        version: of this library, for the last line.
    """
    several = len(runs) > 1
    facts = [facts_of(run) for run in runs]
    style = Markup((ASSETS / "style.css").read_text(encoding="utf-8"))
    context: dict[str, Any] = {
        "views": [_view(run, facts[i], i, len(runs)) for i, run in enumerate(runs)],
        "several": several,
        "title": f"{len(runs)} runs: {', '.join(run.name for run in runs)}" if several else runs[0].name,
        "axes": recorded_axes(runs),
        "reward": reward_figure(runs),
        "sections": section_figures(runs),
        "comparison": comparison(runs, facts) if several else {},
        "differing": differing_settings(runs) if several else {},
        "style": style,
        "style_hash": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": version,
    }
    return _environment().get_template("page.html.j2").render(context)


@functools.cache
def _environment() -> jinja2.Environment:
    """Escapes everything but what is `Markup`; an undefined name is an error."""
    options: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), **options)
    filters: list[Callable[..., str]] = [series.number, series.count, series.duration, series.shorten, dropped_text]
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def _view(run: Run, facts: Facts, index: int, total: int) -> dict[str, Any]:
    """A run as the template shows it; its tables are dicts of a row's name to its cells."""
    info = run.info
    columns, rows = (MOST_COLUMNS, MOST_ROWS) if total == 1 else (4, 5) if total <= 3 else (3, 3)
    grid = grid_of(run, columns, rows)
    versions = info["versions"] if isinstance(info.get("versions"), dict) else {}
    versions = dict(sorted(versions.items())) | {name: info[name] for name in ("device", "processes") if name in info}
    missing = [text for name, text in MISSING.items() if name not in run.names]
    if not run.evals.columns:
        missing.append("Evaluation: none. Give an eval_dataset and set eval_strategy and eval_steps.")
    if not grid:
        missing.append("Pictures: none in samples/. Train with num_log_images above 0; log_images_steps adds points in time.")
    return {
        "run": run,
        "letter": series.letters(index),
        "colour": index % COLOURS,
        "facts": facts,
        "remarks": list(remarks_of(run, facts)),
        "subtitle": _subtitle(info),
        "plan": series.value_text(info.get("plan") or ""),
        "grid": grid,
        "trained_on": _trained_on(info),
        "changed": _rows(info["changed"]),
        "options": _rows(info["options"]),
        "versions": _rows(versions),
        "summary": _rows({name: series.number(v, 4) if isinstance(v, float) else v for name, v in run.summary.items()}),
        "missing": missing,
    }


def _subtitle(info: dict[str, Any]) -> list[str]:
    parts = {
        "model": "/".join(Path(str(info.get("model") or "")).parts[-2:]),  # a hub id as it is; of a folder the last two names
        "reward": ", ".join(map(str, as_list(_arguments(info).get("reward")) or as_list(info.get("rewards")))),
        "estimator": info["options"].get("estimator"),
        "trained parameters:": info.get("trainable_parameters"),
        "started": str(info.get("started") or "").replace("T", " ").replace("+00:00", " UTC"),
        "times resumed:": len(as_list(info.get("resumed"))),
    }
    return [
        f"{name} {series.shorten(f'{value:,}' if isinstance(value, int) else str(value), 80)}"
        for name, value in parts.items()
        if value
    ]


def _arguments(info: dict[str, Any]) -> dict[str, Any]:
    """What the command line was given; nothing for a run from Python."""
    given = info.get("arguments")
    return given if isinstance(given, dict) else {}


def _trained_on(info: dict[str, Any]) -> dict[str, list[str]]:
    """The run's model, rewards with their options, and prompts, as far as they are recorded."""
    rows = {name: [series.value_text(value)] for name, value in _arguments(info).items() if value is not None}
    described = {f"reward function {number}": one for number, one in enumerate(as_list(info.get("reward_functions")), 1)}
    described["prompts as read"] = info.get("prompts")
    return rows | {name: [series.value_text(in_words(one))] for name, one in described.items() if isinstance(one, dict)}


def _rows(values: dict[str, Any]) -> dict[str, list[str]]:
    return {name: [series.value_text(values[name])] for name in sorted(values)}


def comparison(runs: list[Run], facts: list[Facts]) -> dict[str, list[str]]:
    """Key facts, one column a run; the rewards at equal queries and at equal time among them."""
    rows = {
        "Reward, start": [str(f.start) for f in facts],
        "Reward, end": [str(f.end) for f in facts],
        "Best mean": [f"{series.number(f.best)} at {f.best_step}" for f in facts],
    }
    for axis, totals, text in (
        ("reward_queries", [f.queries for f in facts], lambda value: f"{series.count(value)} queries"),
        ("seconds", [f.seconds for f in facts], series.duration),
    ):
        known = [total for total in totals if not math.isnan(total)]
        for limit in (min(known) / 2, min(known)) if len(known) > 1 else ():
            rows[f"Reward after {text(limit)}"] = [str(reward_at(run, axis, limit)) for run in runs]
    rows |= {
        "Updates": [series.count(f.updates) for f in facts],
        "Reward queries": [series.count(f.queries) for f in facts],
        "Training time": [series.duration(f.seconds) for f in facts],
        "Samples dropped": [dropped_text(f) for f in facts],
    }
    for name, title in (("kl", "KL"), ("diversity", "Diversity"), ("motion", "Motion"), ("eval_reward", "Evaluation")):
        if any(name in run.names for run in runs):
            pairs = [series.ends(run.points(name)[1]) for run in runs]
            rows[f"{title}, start → end"] = [f"{series.number(first.value)} → {series.number(last.value)}" for first, last in pairs]
    return rows


def differing_settings(runs: list[Run]) -> dict[str, list[str]]:
    """The options that are not the same in all runs that recorded them.

    Of the options that come from TrainingArguments (not this library's own) a run records those that were changed alone.
    """
    own = {name for run in runs for name in run.info["options"]}

    def cell(run: Run, name: str) -> str:
        """The recorded value; the default where an option that was not changed is not recorded."""
        recorded = run.info["options"] | run.info["changed"]
        absent = "default" if name not in own and run.info["changed"] else series.UNKNOWN
        return series.value_text(recorded[name]) if name in recorded else absent

    names = own.union(*(run.info["changed"] for run in runs)) - NAMES_OF_PLACES
    rows = {name: [cell(run, name) for run in runs] for name in sorted(names)}
    return {name: cells for name, cells in rows.items() if len({*cells} - {series.UNKNOWN}) > 1}


def dropped_text(facts: Facts) -> str:
    """`12 (0.4 %)`."""
    return series.count(facts.dropped) + (f" ({series.number(100 * facts.dropped_share, 2)} %)" if facts.dropped > 0 else "")
