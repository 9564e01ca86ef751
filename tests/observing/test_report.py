"""The report: what it reads, what it says, and that the page is sound in a real browser."""

import base64
import html
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import chromium
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from rlr_trainer.cli import main
from rlr_trainer.observing.monitor import RewardHackingMonitor
from rlr_trainer.observing.report import ReportError, write_report
from rlr_trainer.observing.report import pictures as report_pictures
from rlr_trainer.observing.report.drawing import Series, line_chart
from rlr_trainer.observing.report.facts import facts_of, remarks_of, reward_at
from rlr_trainer.observing.report.page import comparison, differing_settings
from rlr_trainer.observing.report.pictures import (
    LARGEST_SIDE,
    LARGEST_SIDE_OF_CLIPS,
    LONGEST,
    MOST_FRAMES,
    SHORTEST,
    _clip,
    encode,
    grid_of,
)
from rlr_trainer.observing.report.reading import read_run
from rlr_trainer.observing.report.series import (
    BUCKETS,
    Mean,
    duration,
    ends,
    letters,
    mean_of,
    moving_mean,
    number,
    robust_range,
    thin,
    value_text,
)

HOSTILE = """<script>document.title = 'taken'</script><img src=x onerror="alert(1)">' " & </style> </title> {{ 7 * 7 }}"""


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rising(count=40, seed=0, **more):
    """Log lines whose reward rises from 0 to 1; `more` are functions of the progress from 0 to 1."""
    noise = np.random.default_rng(seed)
    return [
        {
            "step": step,
            "reward": step / count + 0.05 * noise.normal(),
            "reward_std": 0.3,
            "loss": -step / count,
            "grad_norm": float(noise.uniform(0.5, 1)),
            "estimator/fo_grad_norm": float(noise.uniform(0.01, 0.02)),
            "estimator/ho_grad_norm": float(noise.uniform(1, 2)),
            "reward_queries": 32 * step,
            "seconds": 1.5 * step,
            "samples_dropped": 0.0,
        }
        | {name: function(step / count) for name, function in more.items()}
        for step in range(1, count + 1)
    ]


CLOSING = {"step": 40, "train_runtime": 60.0, "train_loss": -0.5}


def write_run(folder, lines=None, closing=True):
    """Writes a run's folder; `lines` are those of metrics.jsonl without the closing one."""
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", [*(rising() if lines is None else lines), *([CLOSING] if closing else [])])
    return folder


@pytest.fixture
def make_run(tmp_path):
    return lambda name="run", *arguments, **options: write_run(tmp_path / name, *arguments, **options)


def add_everything(folder, prompt="a red panda", size=24):
    """The files beside metrics.jsonl, as a trainer and `rlr-trainer diagnose` write them."""
    noise = np.random.default_rng(1)
    write_lines(
        folder / "rewards.jsonl",
        [
            {"rollout": n, "step": n, "rewards": [None if i == 0 else float(noise.normal(n / 40, 0.1)) for i in range(8)]}
            for n in range(40)
        ],
    )
    for step in (0, 20, 40):
        pictures = folder / "samples" / f"step_{step:06d}"
        pictures.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(noise.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(pictures / f"{i:03d}.png")
        record = {
            "step": step,
            "seconds": 1.5 * step,
            "prompts": [prompt, "a lighthouse"],
            "rewards": [step / 40, None],
            "diversity": 0.3,
            "files": [f"{pictures.name}/{i:03d}.png" for i in range(2)],
        }
        (folder / "samples" / f"{pictures.name}.json").write_text(json.dumps(record))
    options = {"learning_rate": 1e-3, "seed": 0, "estimator": "rlr", "hub_token": "hf_abc", "output_dir": str(folder)}
    run = {
        "format": 1,
        "started": "2026-11-22T10:00:00+00:00",
        "model": prompt,
        "rewards": ["panda"],
        "plan": prompt,
        "options": options,
        "changed": {"learning_rate": 1e-3, "negative_prompt": prompt},
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "device": "cpu",
        "processes": 1,
        "trainable_parameters": 9984,
        "resumed": [
            {
                "at": "2026-11-22T11:00:00+00:00",
                "update": 17,
                "changed": {"max_grad_norm": [None, 0.5], "rewards": [["panda"], ["bear"]], "hub_token": ["hf_abc", "hf_abcd"]},
            }
        ],
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "summary.json").write_text(json.dumps({"reward_before": 0.1, "reward_after": 0.9, "target": prompt}))
    return folder


def report(*folders):
    path = write_report(folders, folders[0].parent / "report.html")
    return path.read_text(encoding="utf-8")


def text_of(page):
    """What a reader sees: no tags, styles and scripts."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page[page.index("<body>") :], flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


# ---- numbers ----


def test_the_moving_mean_is_over_the_values_that_there_are():
    noisy = np.random.default_rng(0).normal(size=31)
    smooth = moving_mean(noisy, 7)
    np.testing.assert_allclose(smooth[[0, 10, 30]], [noisy[:4].mean(), noisy[7:14].mean(), noisy[-4:].mean()], atol=1e-12)
    np.testing.assert_array_equal(moving_mean(noisy, 1), noisy)


def test_thinning_keeps_extremes_and_ends():
    y = np.random.default_rng(0).normal(size=5000)
    y[1234], y[4321], y[77] = 50.0, -50.0, np.nan
    line = thin(np.arange(5000.0), y)
    assert len(line.x) == BUCKETS and len(line.raw_x) <= 2 * BUCKETS + 2
    assert {50.0, -50.0, y[0], y[-1]} <= set(line.raw_y)
    assert (np.diff(line.raw_x) > 0).all()


def test_means_and_ends():
    assert math.isnan(mean_of(np.array([np.nan])).value)
    mean = mean_of(np.array([1.0, 2.0, 3.0, 4.0, np.nan]))
    assert (mean.value, mean.error) == (2.5, pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2))
    assert math.isnan(mean_of(np.array([1.0, 2.0])).error)
    assert [mean.value for mean in ends(np.arange(100.0))] == [4.5, 94.5]
    assert ends(np.array([3.0]))[1].value == 3.0


def test_one_spike_does_not_flatten_the_others():
    values = np.append(np.random.default_rng(0).normal(size=200), 1e6)
    low, high = robust_range(values)
    assert low == values.min() and high < 20


def test_wording():
    texts = [number(v) for v in (math.nan, 0, 0.12345, 0.9999, 1234567, 1.5e-9, -2.0)]
    assert texts == ["\N{EN DASH}", "0", "0.123", "1", "1,234,567", "1.5e-09", "-2"]
    assert [str(Mean(*pair)) for pair in ((0.9948, 0.0052), (12.0, math.nan), (-1234.5, 67.8))] == [
        "0.9948 ± 0.0052",
        "12",
        "-1,234 ± 68",
    ]
    assert [duration(s) for s in (math.nan, 59.7, 20320)] == ["\N{EN DASH}", "0:01:00", "5:38:40"]
    assert [letters(i) for i in (0, 25, 26, 27)] == ["A", "Z", "A1", "B1"]
    assert [value_text(v) for v in (None, True, 3e-4, [1, 2], "x")] == ["none", "true", "0.0003", "[1, 2]", "x"]


def test_a_chart_shows_its_numbers_and_leaves_colours_and_fonts_to_the_page():
    steps = np.arange(1.0, 41.0)
    lines = [Series(label, colour, thin(steps, steps / 4000)) for colour, label in enumerate("AB")]
    options = {"title": "<b>", "x_label": "updates", "size": (440, 250)}
    svg = line_chart(lines, log=False, identity="one", **options)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"0", "20", "40", "updates", "0.006", "A", "B"} <= set(texts)
    places = [float(y) for y in re.findall(r'y="([^"]+)"[^>]*>[AB]</text>', svg)]
    assert abs(places[0] - places[1]) > 10  # the lines end at one point, the labels do not
    assert 'aria-label="&lt;b&gt;"' in svg and 'stroke="var(--c1)"' in svg
    assert "style" not in svg and not re.search(r"#[0-9a-f]{6}\W", svg)  # the page's policy forbids style attributes
    other = line_chart(lines, log=False, identity="two", **options)
    ids = [set(re.findall(r'id="([^"]+)"', part)) for part in (svg, other)]
    assert ids[0] and not ids[0] & ids[1] - {"matplotlib.axis_1", "matplotlib.axis_2"}
    powers = [Series("", 0, thin(steps, 10 ** (-steps / 10)))]
    assert {"0.1", "0.01"} <= set(re.findall(r">([^<]*)</text>", line_chart(powers, log=True, identity="three", **options)))


# ---- reading ----


def test_a_folder_with_metrics_alone_gives_a_report_that_says_what_is_missing(make_run):
    lines = [{"step": row["step"], "reward": row["reward"]} for row in rising()[:2]]
    page = report(make_run(lines=lines))
    text = text_of(page)
    for part in ("log_images_steps", "kl_coef", "eval_dataset", "no seconds in metrics.jsonl"):
        assert part in text
    assert "noise not known" in text
    assert "Fixed prompts over time" not in text
    assert page.count(" disabled>") == 2  # the axes that nobody recorded
    chart = page[page.index('class="on-updates"') : page.index('class="on-queries"')]
    assert {"1", "2"} >= set(re.findall(r'text-anchor="middle"[^>]*>([^<]+)<', chart)) - {"updates"}  # marks at whole numbers


def test_rewards_that_are_not_finite_at_the_end(make_run):
    lines = [row | {"reward": None} if row["step"] > 30 else row for row in rising()]
    remark = remarks(make_run(lines=lines))["Values that are not finite"]
    assert remark.startswith("reward in 10 log lines. The last finite reward is that of update 30")
    assert "The last finite" not in remarks(make_run("middle", [*lines[:32], *rising()[35:]]))["Values that are not finite"]


def test_several_evaluations_of_one_update(make_run):
    lines = rising() + [{"step": s, f"eval_{name}_reward": s / 40} for s in (20, 40) for name in ("seen", "unseen")]
    evals = read_run(make_run(lines=lines)).evals
    assert [list(evals.columns[f"eval_{name}_reward"]) for name in ("seen", "unseen")] == [[0.5, 1], [0.5, 1]]


def test_damaged_files_are_left_out_with_a_note(make_run):
    folder = add_everything(make_run(closing=False))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('[1, 2]\n{"step": "x"}\n{"step": 41, "rew')
    with open(folder / "rewards.jsonl", "a") as file:
        file.write('{"rollout": 40, "step": 40, "rewards": [0.1, ')
    (folder / "run.json").write_text("{")
    (folder / "summary.json").write_text("[]")
    (folder / "samples" / "step_000020.json").write_text('{"prompts": 3}')
    (folder / "samples" / "step_000040" / "001.png").write_bytes(b"no picture")
    run = read_run(folder)
    assert run.notes == [
        "metrics.jsonl: 3 damaged lines left out, as a run leaves that is killed.",
        "run.json: left out, it is no JSON object.",
        "samples/step_000020.json: left out, it has no step.",
        "rewards.jsonl: 1 damaged lines left out, as a run leaves that is killed.",
        "summary.json: left out, it is no JSON object.",
    ]
    assert grid_of(run).notes == ["1 picture files are missing, damaged, neither PNG nor GIF, or outside the folder."]
    assert "No closing line" in remarks(folder)


def test_nothing_outside_the_folder_is_read(make_run, tmp_path):
    folder = add_everything(make_run())
    Image.new("RGB", (24, 24), "red").save(tmp_path / "secret.png")
    path = folder / "samples" / "step_000000.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"files": ["../../secret.png", "circle"]}))
    (folder / "samples/circle").symlink_to(folder / "samples/circle")
    for name in ("summary.json", "run.json", "samples/step_000020.json"):
        (tmp_path / "secret.json").write_text('{"step": 1, "secret": 1}')
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret.json")
    run = read_run(folder)
    assert [file for *_, file in run.pictures[0].rows] == [None, None]
    assert [pictures.step for pictures in run.pictures] == [0, 40]
    assert not run.summary and not run.info["options"]
    assert sum("no plain file inside the folder" in note for note in run.notes) == 3
    (tmp_path / "away").mkdir()
    (tmp_path / "away/metrics.jsonl").symlink_to(folder / "metrics.jsonl")
    with pytest.raises(ReportError, match=r"has no metrics.jsonl.*metrics.jsonl: left out, it is no plain file inside"):
        read_run(tmp_path / "away")


@pytest.fixture
def alarm():
    """Waiting for ever becomes an error."""

    def ring(*_):
        pytest.fail("still waiting")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_clip(path, frames=5, size=24, duration=120, **options):
    """A GIF whose frames are noise, so that none of them is merged with the one before."""
    noise = np.random.default_rng(frames)
    first, *others = [Image.fromarray(noise.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(frames)]
    first.save(path, "GIF", save_all=True, append_images=others, duration=duration, loop=0, **options)
    return path


def shown_frames(source):
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", source).groups()
    with Image.open(io.BytesIO(base64.b64decode(data)), formats=[kind.upper()]) as opened:
        return kind, getattr(opened, "n_frames", 1), opened.size


@pytest.mark.medium
def test_clips_are_shown_as_clips(tmp_path):
    """Made anew from the pixels: nothing of the file itself goes into the page. Long ones lose frames, not time."""
    small = encode(make_clip(tmp_path / "small.gif", comment=b"<script>secret</script>"))
    assert (
        shown_frames(small.source) == ("webp", 5, (24, 24))
        and shown_frames(small.still) == ("png", 1, (24, 24))
        and small.pixelated
    )
    assert b"secret" not in base64.b64decode(small.source.split(",")[1])
    large = encode(make_clip(tmp_path / "large.gif", frames=50, size=300))
    assert shown_frames(large.source) == ("webp", MOST_FRAMES, (LARGEST_SIDE_OF_CLIPS,) * 2)
    assert shown_frames(large.still)[0] == "jpeg" and (large.width, large.height) == (LARGEST_SIDE_OF_CLIPS,) * 2
    with Image.open(tmp_path / "large.gif") as opened:
        kept, milliseconds = _clip(opened)
    assert len(kept) == MOST_FRAMES and milliseconds == 50 * 120 // MOST_FRAMES
    one = encode(make_clip(tmp_path / "one.gif", frames=1))
    assert one.still is None and shown_frames(one.source) == ("png", 1, (24, 24))


def test_clips_that_are_hostile_are_left_out(tmp_path, monkeypatch):
    """Cut off in a later frame, of too many frames or pixels, or of another format; a frame's time is limited, too."""
    data = make_clip(tmp_path / "whole.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(data[: len(data) // 2])
    (tmp_path / "bomb.gif").write_bytes(data[:6] + b"\xff\xff\xff\xff" + data[10:])  # a canvas of 65,535 x 65,535
    Image.new("RGB", (9, 9)).save(tmp_path / "other.gif", "WEBP")
    for name in ("cut.gif", "bomb.gif", "other.gif", "none.gif"):
        assert encode(tmp_path / name) is None, name
    for most in ((4, 2**28), (1024, 4 * 24 * 24)):
        monkeypatch.setattr(report_pictures, "MOST_READ", most)
        assert encode(tmp_path / "whole.gif") is None
    monkeypatch.undo()
    assert encode(tmp_path / "whole.gif") is not None
    for asked, shown in ((0, SHORTEST), (600_000, LONGEST)):
        with Image.open(make_clip(tmp_path / "slow.gif", duration=asked)) as opened:
            assert _clip(opened)[1] == shown


@pytest.mark.usefixtures("alarm")
def test_clips_outside_the_folder_are_not_read(make_run, tmp_path):
    folder = add_everything(make_run())
    make_clip(tmp_path / "secret.gif")
    path = folder / "samples" / "step_000000.json"
    os.mkfifo(folder / "samples/pipe.gif")
    (folder / "samples/link.gif").symlink_to(tmp_path / "secret.gif")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": ["pipe.gif", "link.gif"]}))
    assert [file for *_, file in read_run(folder).pictures[0].rows] == [None, None]


@pytest.mark.medium
def test_motion_has_its_chart_and_clips_hold_still_in_print(make_run):
    folder = add_everything(make_run(lines=rising(motion=lambda p: 0.05 + 0.01 * p)))
    for path in (folder / "samples").glob("step_*.json"):
        record = json.loads(path.read_text())
        make_clip(folder / "samples" / path.stem / "000.gif", frames=3)
        files = [f"{path.stem}/000.gif", f"{path.stem}/001.png"]
        path.write_text(json.dumps(record | {"motion": 0.05 + record["step"] / 1000, "files": files}))
    page = report(folder)
    assert {"motion", "fixed/motion", "KL, diversity and motion"} <= set(re.findall(r"<h[23]>([^<]*)</h[23]>", page))
    assert page.count("data:image/webp;base64,") == 3
    assert page.count('<source media="print, (prefers-reduced-motion: reduce)" srcset="data:image/png;base64,') == 3


@pytest.mark.usefixtures("alarm")
def test_a_pipe_is_not_waited_for(make_run):
    folder = add_everything(make_run())
    for name in ("samples/step_000000/000.png", "summary.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    run = read_run(folder)
    assert "summary.json: left out, it is no plain file inside the folder." in run.notes
    assert grid_of(run).notes == ["1 picture files are missing, damaged, neither PNG nor GIF, or outside the folder."]


def test_only_png_files_are_opened(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a) or Image.new("RGB", (9, 9)).im)
    (tmp_path / "000.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "001.png", "BMP")
    for name in ("000.png", "001.png", "none.png", "long" * 1000):
        assert encode(tmp_path / name) is None
    assert started == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no metrics.jsonl with a finite reward"),
        ("", "with a finite reward"),
        ('{"step": 1, "reward": null}\n', "with a finite reward"),
    ],
)
def test_a_folder_without_a_run_is_an_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ReportError, match=message):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_outputs_that_cannot_be(make_run, tmp_path):
    folder = make_run()
    with pytest.raises(ReportError, match=r"must end in \.html"):
        write_report([folder], folder / "metrics.jsonl")
    with pytest.raises(ReportError, match="given twice"):
        write_report([folder, tmp_path / "." / "run"], tmp_path / "report.html")
    (tmp_path / "x.html").mkdir()
    with pytest.raises(ReportError, match="is a folder"):
        write_report([folder], tmp_path / "x.html")
    with pytest.raises(ReportError, match="no such folder"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")


@pytest.mark.medium
def test_the_command(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(lines=rising()[:2])
    assert main(["report", "run", "--output", "deep/er/r.html"]) == 0
    assert "written to deep/er/r.html" in capsys.readouterr().out
    assert Path("deep/er/r.html").is_file()
    assert main(["report", "nothing"]) != 0
    assert "no such folder" in capsys.readouterr().err


# ---- what it says ----


def remarks(folder):
    run = read_run(folder)
    return dict(remarks_of(run, facts_of(run)))


def test_a_healthy_run_has_no_remarks(make_run):
    assert remarks(make_run(lines=rising(diversity=lambda p: 0.3, clip_ratio=lambda p: 0.1, kl=lambda p: p))) == {}


@pytest.mark.parametrize(
    ("more", "title"),
    [
        ({"diversity": lambda p: 0.3 - 0.28 * p}, "Signs of reward hacking"),
        ({"motion": lambda p: 0.05 - 0.045 * p}, "Signs of reward hacking"),
        ({"loss": lambda p: None if p == 0.5 else 0.0}, "Values that are not finite"),
        ({"reward": lambda p: -p + 0.01 * math.sin(99 * p)}, "The reward fell"),
        ({"reward": lambda p: math.sin(80 * p)}, "No clear change of the reward"),
    ],
)
def test_remarks(make_run, more, title):
    assert title in remarks(make_run(lines=rising(**more)))


def test_the_remark_on_hacking_is_the_monitors_warning(make_run):
    """At the line at which it came."""
    lines = rising(diversity=lambda p: 0.3 - 0.28 * p)
    monitor, state = RewardHackingMonitor(), SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[])
    monitor.on_train_begin(None, state, None)
    for state.global_step in range(1, 41):
        monitor.on_log(None, state, None, logs=lines[state.global_step - 1])
        if monitor.warnings:
            break
    text = remarks(make_run(lines=lines))["Signs of reward hacking"]
    assert text.startswith(f"At update {state.global_step}: {monitor.warnings['diversity']}.")


def test_remarks_from_other_files(make_run):
    lines = rising() + [{"step": step, "eval_reward": 1 - step / 40, "eval_reward_std": 0.2} for step in (10, 20, 30, 40)]
    folder = add_everything(make_run(lines=lines, closing=False))
    assert list(remarks(folder)) == ["Many samples dropped", "No closing line", "Signs of reward hacking"]


def test_other_rewards_and_prompts_of_a_resumption_are_told(make_run):
    folder = make_run()
    prompts = [{"rows": 1, "sha256": sha, "first": [text]} for sha, text in (("a1", "a cat"), ("b2", "a dog"))]
    rewards = [[{"function": "rewards:digit", "options": {"target": target}}] for target in (7, 3)]
    changed = {"max_steps": [2, 3], "prompts": prompts, "reward_functions": rewards}
    entries = [{"update": 2, "changed": changed}, {"update": 3, "changed": {"max_steps": [3, 4]}}, {"changed": None}, "?"]
    (folder / "run.json").write_text(json.dumps({"options": {}, "resumed": entries}))
    assert remarks(folder)["Resumed with another reward or other prompts"].startswith(
        "After update 2: rewards:digit(target=3) in place of rewards:digit(target=7). After update 2: 1 prompt ('a dog'), sha256 b2 in "
        "place of 1 prompt ('a cat'), sha256 a1."
    )


def test_facts(make_run):
    lines = [{"step": s, "reward": float(s), "reward_queries": 10 * s, "seconds": 2.0 * s} for s in range(1, 101)]
    run = read_run(make_run(lines=lines))
    facts = facts_of(run)
    assert (facts.updates, facts.window, facts.queries, facts.seconds) == (100, 10, 1000, 200)
    assert (facts.start.value, facts.end.value, facts.change.value) == (5.5, 95.5, 90)
    assert facts.best == pytest.approx(95.5) and facts.best_step == 95
    assert reward_at(run, "reward_queries", 500).value == 45.5  # lines 41 to 50
    assert reward_at(run, "seconds", 40).value == 15.5
    assert math.isnan(reward_at(run, "seconds", 1).value)


@pytest.mark.medium
def test_runs_are_compared_at_equal_queries_and_time(make_run):
    slow = make_run("run/slow", [row | {"reward": row["reward"] / 2, "kl": 0.1} for row in rising()])
    fast = make_run("run/fast", [row | {"seconds": row["step"] * 0.5} for row in rising(20, extra=lambda p: p)])
    for folder, rate in ((slow, 1e-3), (fast, 1e-4)):
        changed = {"learning_rate": rate, "output_dir": folder.name} | ({"max_steps": 20} if folder is fast else {})
        (folder / "run.json").write_text(json.dumps({"options": {"fo_steps": None}, "changed": changed}))  # as a run writes it
    runs = [read_run(folder) for folder in (slow, fast)]
    rows = comparison(runs, [facts_of(run) for run in runs])
    assert "Reward after 640 queries" in rows and "Reward after 0:00:10" in rows
    assert rows["Training time"] == ["0:01:00", "0:00:10"]
    assert rows["KL, start → end"] == ["0.1 → 0.1", "\N{EN DASH} → \N{EN DASH}"]
    assert differing_settings(runs) == {"learning_rate": ["0.001", "0.0001"], "max_steps": ["default", "20"]}
    namesake = make_run("other/slow", rising()[:2])
    rows = differing_settings([*runs, read_run(namesake)])  # which recorded nothing
    assert rows["learning_rate"] == ["0.001", "0.0001", "\N{EN DASH}"]
    text = text_of(report(slow, fast, namesake))
    for part in ("3 runs compared", "run/slow", "other/slow", "extra"):
        assert part in text


# ---- pictures ----


def test_pictures_are_reduced_and_small_ones_kept(tmp_path):
    Image.new("RGB", (1024, 512), "red").save(tmp_path / "large.png")
    Image.new("L", (32, 32)).save(tmp_path / "small.png")
    picture = encode(tmp_path / "large.png")
    assert (picture.width, picture.height) == (LARGEST_SIDE, LARGEST_SIDE // 2) and not picture.pixelated
    assert picture.source.startswith("data:image/jpeg;base64,")
    picture = encode(tmp_path / "small.png")
    assert picture.pixelated and picture.source.startswith("data:image/png;base64,")


def test_the_number_of_pictures_is_capped(make_run):
    run = read_run(add_everything(make_run(), size=200))
    whole = grid_of(run)
    assert len(whole.rows) == 2 and whole.steps == [0, 20, 40] and whole.notes == []
    capped = grid_of(run, most_columns=2, most_rows=1)
    assert len(capped.rows) == 1 and capped.steps == [0, 40]
    assert "1 of 2 pictures at 2 of 3 points in time are shown" in " ".join(capped.notes)


# ---- the page ----


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The reports of a run with everything in it, and of two."""
    folder = tmp_path_factory.mktemp("pages")
    lines = rising(**{f"metric {HOSTILE}": lambda p: p})
    name = f"run {HOSTILE} {'without_any_spaces_' * 5}".replace("/", "_")
    run = add_everything(write_run(folder / name, lines), HOSTILE)
    other = add_everything(write_run(folder / "other"), "panda \ud800 end")
    return [write_report([run], folder / "one.html"), write_report([run, other], folder / "two.html")]


def test_the_whole_page(pages):
    """All its parts; users' text, even what is no valid Unicode, is escaped everywhere; it asks for nothing and holds no secret."""
    pages = [path.read_text(encoding="utf-8") for path in pages]
    for page in pages:
        text = text_of(page)
        assert page.count("<style>") == 1 and "<script" not in page
        assert "default-src 'none'" in page and "script-src" not in page
        assert "onerror=" in text  # it is there, as text
        assert not re.search(r"<img(?! class=\"(pixelated)?\" src=\"data:image/)", page)
        assert "{{ 7 * 7 }}" in text and " 49 " not in re.findall(r"<title>.*?</title>", page)[0]
        assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"|@import|url\((?!#)", page)
        assert "hf_abc" not in page and "(hidden)" in text
    for part in (
        "Fixed prompts over time",
        "estimator/fo_grad_norm",
        "negative_prompt",
        "2.13.0",
        "trained parameters: 9,984",
        "times resumed: 1",
        "40 (12 %)",
        "Summary",
    ):
        assert part in text_of(pages[0]), part
    assert pages[0].count("data:image/png;base64,") == 6
    assert "panda ? end" in text_of(pages[1])


@pytest.mark.medium
def test_it_loads_no_heavy_library():
    program = "import sys, rlr_trainer.observing.report; print(*{'torch', 'transformers', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.medium
def test_in_a_browser(pages, tmp_path):
    """No complaint in the console, no request, nothing wider than a phone; the switch works without a script, print shows updates."""
    shown = "[...document.querySelectorAll('#reward .on-updates, #reward .on-queries')].map(e => getComputedStyle(e).display)"
    with chromium.browser(tmp_path / "profile") as page:
        for path in pages:
            for width, dark in ((360, False), (360, True), (1280, False)):
                page.open(path, width, dark=dark)
                assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(shown) == ["block", "none"]
            page.evaluate("document.querySelector('label[for=axis-queries]').click()")
            assert page.evaluate(shown) == ["none", "block"]
            page.call("Emulation.setEmulatedMedia", media="print")
            assert page.evaluate(shown) == ["block", "none"]
            assert page.pdf().startswith(b"%PDF")
            page.call("Emulation.setEmulatedMedia", media="")
        assert page.evaluate("document.title").endswith("training report")
        assert page.errors == []
        assert {url.split(":")[0] for url in page.requests} == {"file", "data"}
        assert {url for url in page.requests if url.startswith("file")} == {path.as_uri() for path in pages}


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.medium
def test_the_browser_check_sees_errors_and_requests(tmp_path):
    (tmp_path / "bad.html").write_text("<script>console.error('no'); fetch('file:///nothing'); undefined_name()</script>")
    with chromium.browser(tmp_path / "profile") as page:
        page.open(tmp_path / "bad.html")
        assert len(page.errors) >= 2
        assert any("nothing" in url for url in page.requests)
