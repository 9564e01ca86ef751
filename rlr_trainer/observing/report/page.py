"""Puts the page together: everything the template shows, computed here; style and script go in with their hashes in the page's policy."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import functools
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlr_trainer.observing.report import tables, wording
from rlr_trainer.observing.report.charts import STEP_PROFILE, Charts, Figure
from rlr_trainer.observing.report.facts import Facts, Remark, facts_of, is_clear, remarks_of
from rlr_trainer.observing.report.pictures import MOST_BYTES, MOST_COLUMNS, MOST_ROWS, Grid, grid_of
from rlr_trainer.observing.report.reading import Run

ASSETS = Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class RunView:
    """A run as the template shows it."""

    run: Run
    letter: str
    colour: int
    facts: Facts
    remarks: list[Remark]
    subtitle: list[str]
    plan: str
    grid: Grid | None
    paired: str
    constants: list[str]
    changed: tables.Table | None
    options: tables.Table | None
    resumed: tables.Table | None
    versions: tables.Table | None
    diagnosis: tables.Table | None
    summary: tables.Table | None
    missing: list[str]


@dataclasses.dataclass(frozen=True)
class Section:
    """Charts under a heading."""

    identity: str
    title: str
    figures: list[Figure]
    text: str = ""


def render(runs: list[Run], version: str) -> str:
    """The page of some runs, as HTML.

    Args:
        version: of this library, for the last line.
    """
    charts = Charts(runs)
    views = [_view(run, i, len(runs), charts) for i, run in enumerate(runs)]
    facts = [view.facts for view in views]
    style, script = (Markup((ASSETS / name).read_text(encoding="utf-8")) for name in ("style.css", "script.js"))
    context: dict[str, Any] = {
        "views": views,
        "several": len(runs) > 1,
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}",
        "charts": charts,
        "axes": charts.axes,
        "reward": charts.reward(),
        "sections": _sections(charts),
        "distributions": charts.distributions(),
        "comparison": tables.comparison(runs, facts) if len(runs) > 1 else None,
        "differing": tables.differing_settings(runs) if len(runs) > 1 else None,
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
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
    """As a content security policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _sections(charts: Charts) -> list[Section]:
    found = [
        Section("rewards", "Rewards in detail", charts.rewards()),
        Section("drift", "KL and diversity", charts.drift()),
        Section("estimator", "Estimator", charts.estimator()),
        Section("cost", "Time and losses of samples", charts.costs()),
        Section("others", "Other logged values", charts.others()),
    ]
    return [section for section in found if section.figures]


def _view(run: Run, index: int, total: int, charts: Charts) -> RunView:
    facts = facts_of(run)
    columns, rows = (MOST_COLUMNS, MOST_ROWS) if total == 1 else (4, 5) if total <= 3 else (3, 3)
    grid = grid_of(run, MOST_BYTES // total, columns, rows)
    changed, options = run.changed, run.options
    return RunView(
        run=run,
        letter=wording.letters(index),
        colour=index % 8,
        facts=facts,
        remarks=remarks_of(run, facts),
        subtitle=_subtitle(run),
        plan=wording.shorten(wording.value_text(run.info["plan"]), 500) if run.info.get("plan") else "",
        grid=grid,
        paired=_paired(run),
        constants=[f"{name}: {wording.number(value)}" for name, value in charts.constants(run)],
        changed=tables.settings(changed) if changed else None,
        options=tables.settings(options) if options else None,
        resumed=tables.changed_on_resuming(run),
        versions=tables.versions(run),
        diagnosis=tables.diagnosis(run),
        summary=tables.demo_summary(run),
        missing=_missing(run, grid),
    )


def _subtitle(run: Run) -> list[str]:
    info = run.info
    rewards = info.get("rewards")
    parameters, resumed = info.get("trainable_parameters"), info.get("resumed")
    parts = [
        f"model {wording.shorten(_model_name(str(info['model'])), 80)}" if info.get("model") else "",
        f"reward {wording.shorten(', '.join(map(str, rewards)), 80)}" if isinstance(rewards, list) and rewards else "",
        f"estimator {run.options['estimator']}" if run.options.get("estimator") else "",
        f"{parameters:,} trained parameters" if isinstance(parameters, int) else "",
        f"started {wording.shorten(str(info['started']).replace('T', ' ').replace('+00:00', ' UTC'), 40)}"
        if info.get("started")
        else "",
        f"resumed {'once' if len(resumed) == 1 else f'{len(resumed)} times'}" if isinstance(resumed, list) and resumed else "",
    ]
    return [part for part in parts if part]


def _model_name(model: str) -> str:
    """A hub id as it is; of a folder the last two names."""
    parts = model.replace("\\", "/").rstrip("/").split("/")
    return model if len(parts) <= 2 else "/".join(parts[-2:])


def _paired(run: Run) -> str:
    """In how many of the fixed pictures the reward rose, where the same prompts were rewarded at both ends."""
    taken = [pictures for pictures in run.pictures if pictures.files]
    if len(taken) < 2 or taken[0].prompts != taken[-1].prompts:
        return ""
    pairs = [(a, b) for a, b in zip(taken[0].rewards, taken[-1].rewards, strict=True) if a is not None and b is not None]
    if not pairs:
        return ""
    better = sum(b > a for a, b in pairs)
    return f"The reward rose for {better} of {len(pairs)} pictures between update {taken[0].step} and update {taken[-1].step}."


def _missing(run: Run, grid: Grid | None) -> list[str]:
    """Parts that the folder has no data for, and what gives them."""
    if grid is None:
        pictures = [
            "Pictures over time: none in samples/. Train with num_log_images above 0; log_images_steps adds points in time."
        ]
    else:
        pictures = []
    absent = [
        ("Rewards against queries: no reward_queries in metrics.jsonl.", run.train.get("reward_queries") is None),
        ("Rewards against time: no seconds in metrics.jsonl, which runs of this version log.", run.train.get("seconds") is None),
        ("Distribution of rewards: no rewards.jsonl, which runs of this version write.", len(run.rollouts) < 2),
        ("KL: not logged. Train with kl_coef set; 0 logs it without using it.", run.train.get("kl") is None),
        (
            "Diversity: not logged; runs of this version log it where two pictures share a prompt.",
            run.train.get("diversity") is None and not any(p.diversity is not None for p in run.pictures),
        ),
        (
            "Gradient norms of the estimator's parts: not logged. Train with log_estimator_norms=True.",
            not any(name.startswith("estimator/") for name in run.train.columns),
        ),
        (
            "Gradient norms of the single denoising steps: not logged. Train with log_step_norms=True.",
            not any(name.startswith(STEP_PROFILE) for name in run.train.columns),
        ),
        ("Evaluation: none. Give an eval_dataset and set eval_strategy and eval_steps.", not len(run.evals)),
        ("Settings and versions: no run.json, which runs of this version write.", not run.info.get("versions")),
        (
            "Comparison of estimators: no diagnosis.json. rlr-trainer diagnose with this run's output_dir writes it.",
            run.diagnosis is None,
        ),
    ]
    return [*pictures, *(text for text, is_absent in absent if is_absent)]
