"""Puts the page together: everything the template shows, computed here; the style goes in with its hash in the page's policy."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlr_trainer.observing.report import tables, wording
from rlr_trainer.observing.report.charts import STEP_PROFILE, Charts, Figure
from rlr_trainer.observing.report.drawing import COLOURS
from rlr_trainer.observing.report.facts import facts_of, is_clear, remarks_of
from rlr_trainer.observing.report.pictures import MOST_BYTES, MOST_COLUMNS, MOST_ROWS, Grid, grid_of
from rlr_trainer.observing.report.reading import Run

ASSETS = Path(__file__).parent / "assets"


def render(runs: list[Run], version: str) -> str:
    """The page of some runs, as HTML.

    Args:
        version: of this library, for the last line.
    """
    charts = Charts(runs)
    views = [_view(run, i, len(runs)) for i, run in enumerate(runs)]
    facts = [view["facts"] for view in views]
    style = Markup((ASSETS / "style.css").read_text(encoding="utf-8"))
    context: dict[str, Any] = {
        "views": views,
        "several": len(runs) > 1,
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}",
        "axes": charts.axes,
        "reward": charts.reward(),
        "sections": _sections(charts),
        "comparison": tables.comparison(runs, facts) if len(runs) > 1 else None,
        "differing": tables.differing_settings(runs) if len(runs) > 1 else None,
        "style": style,
        "style_hash": _hash(style),
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": version,
    }
    return _environment().get_template("page.html.j2").render(context)


@functools.cache
def _environment() -> jinja2.Environment:
    """Escapes everything but what is `Markup`; an undefined name is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.number,
        "count": wording.count,
        "with_error": wording.with_error,
        "duration": wording.duration,
        "shorten": wording.shorten,
        "dropped": tables.dropped_text,
    }
    environment.tests["clear"] = is_clear
    return environment


def _hash(text: str) -> str:
    """As a content security policy names an inline style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _sections(charts: Charts) -> dict[str, list[Figure]]:
    """Heading -> its charts."""
    found = {
        "Distribution of rewards before and after": charts.distributions(),
        "Rewards in detail": charts.rewards(),
        "KL and diversity": charts.drift(),
        "Estimator": charts.estimator(),
        "Time and losses of samples": charts.costs(),
        "Other logged values": charts.others(),
    }
    return {title: figures for title, figures in found.items() if figures}


def _view(run: Run, index: int, total: int) -> dict[str, Any]:
    """A run as the template shows it."""
    facts = facts_of(run)
    summary = {name: wording.number(value, 4) if isinstance(value, float) else value for name, value in (run.summary or {}).items()}
    columns, rows = (MOST_COLUMNS, MOST_ROWS) if total == 1 else (4, 5) if total <= 3 else (3, 3)
    grid = grid_of(run, MOST_BYTES // total, columns, rows)
    return {
        "run": run,
        "letter": wording.letters(index),
        "colour": index % COLOURS,
        "facts": facts,
        "remarks": remarks_of(run, facts),
        "subtitle": _subtitle(run),
        "plan": wording.shorten(wording.value_text(run.info["plan"]), 500) if run.info.get("plan") else "",
        "grid": grid,
        "changed": tables.settings(run.changed),
        "options": tables.settings(run.options),
        "resumed": tables.changed_on_resuming(run),
        "versions": tables.versions(run),
        "summary": tables.settings(summary),
        "missing": _missing(run, grid),
    }


def _subtitle(run: Run) -> list[str]:
    info = run.info
    rewards, parameters, resumed = (info.get(name) for name in ("rewards", "trainable_parameters", "resumed"))
    parts = {
        "model": "/".join(Path(str(info.get("model") or "")).parts[-2:]),  # a hub id as it is; of a folder the last two names
        "reward": ", ".join(map(str, rewards)) if isinstance(rewards, list) else "",
        "estimator": run.options.get("estimator"),
        "trained parameters:": f"{parameters:,}" if isinstance(parameters, int) else "",
        "started": str(info.get("started") or "").replace("T", " ").replace("+00:00", " UTC"),
        "times resumed:": len(resumed) if isinstance(resumed, list) else 0,
    }
    return [f"{name} {wording.shorten(str(value), 80)}" for name, value in parts.items() if value]


def _missing(run: Run, grid: Grid | None) -> list[str]:
    """Parts that the folder has no data for, and what gives them."""
    names = run.train.columns
    absent = {
        "Pictures over time: none in samples/. Train with num_log_images above 0; log_images_steps adds points in time.": not grid,
        "Rewards against queries: no reward_queries in metrics.jsonl.": "reward_queries" not in names,
        "Rewards against time: no seconds in metrics.jsonl, which runs of this version log.": "seconds" not in names,
        "Distribution of rewards: no rewards.jsonl, which runs of this version write.": len(run.rollouts) < 2,
        "KL: not logged. Train with kl_coef set; 0 logs it without using it.": "kl" not in names,
        "Diversity: not logged; runs of this version log it where two pictures share a prompt.": "diversity" not in names,
        "Gradient norms of the estimator's parts: not logged. Train with log_estimator_norms=True.": not any(
            name.startswith("estimator/") for name in names
        ),
        "Gradient norms of the single denoising steps: not logged. Train with log_step_norms=True.": not any(
            name.startswith(STEP_PROFILE) for name in names
        ),
        "Evaluation: none. Give an eval_dataset and set eval_strategy and eval_steps.": not len(run.evals),
        "Settings and versions: no run.json, which runs of this version write.": not run.info.get("versions"),
    }
    return [text for text, is_absent in absent.items() if is_absent]
