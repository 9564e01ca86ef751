"""The diagnosis as a whole: candidates, rows, verdicts, recommendation, and the files of the command line."""

import copy
import dataclasses
import importlib
import json
import time
from pathlib import Path

import pytest

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.cli import main
from rlr_trainer.diagnosis import diagnose
from rlr_trainer.diagnosis.plans import Candidate, default_candidates, zeroth_order_options
from rlr_trainer.diagnosis.result import PlanRow, format_bias, format_estimate
from rlr_trainer.diagnosis.rows import notes_on_power, recommend
from rlr_trainer.diagnosis.statistics import Estimate, RelativeBias
from rlr_trainer.diagnosis.step_profile import BLACK_BOX, Deadline, build_profile
from rlr_trainer.diagnosis.workbench import untouched
from rlr_trainer.digits.rewards import digit_reward, ink
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.rewards import jpeg_compressibility

# ---- verdicts on the bundled model ----

OPTIONS = {
    "full_bp": {}, "ddpo": {}, "rlr K=2": {"fo_steps": 2}, "rlr K=1 h=2": {"fo_steps": 1, "ho_length": 2},
    "rlr K=2 control variate": {"fo_steps": 2, "control_variate": True}, "draft K=1": {}, "sqdf": {},
}  # fmt: skip


def candidates_of(options, num_steps):
    return [
        Candidate(name, EstimatorPlan.from_preset(name.split()[0], num_steps, **given), {"estimator": name.split()[0]} | given)
        for name, given in options.items()
    ]


@pytest.fixture(scope="module")
def ink_diagnosis(digits_pipeline_master, tmp_path_factory):
    """Brightness is a smooth reward: its gradient is not lost in noise after a few batches of 4."""
    config = RLRConfig(
        output_dir=str(tmp_path_factory.mktemp("run")), sample_num_steps=4, sample_guidance_scale=1.0, per_device_train_batch_size=4,
        lora_r=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = RLRTrainer(config, ink, lambda: (digits.PROMPT, {}), copy.deepcopy(digits_pipeline_master))
    return diagnose(trainer, num_batches=6, time_limit=600, candidates=candidates_of(OPTIONS, 4))


@pytest.mark.slow
def test_the_missing_shares_of_truncated_backpropagation_are_seen(ink_diagnosis):
    row = ink_diagnosis.row("draft K=1")
    assert row.biases
    assert row.bias.verdict == "biased"
    # exactly what is missing: the part of the reference that the last step does not capture
    assert row.captured.value < 0.5
    assert row.bias.value == pytest.approx(1 - row.captured.value, abs=0.3)


@pytest.mark.medium
def test_unbiased_plans_show_no_bias(ink_diagnosis):
    for name in ("ddpo", "rlr K=2", "rlr K=1 h=2", "full_bp"):
        assert ink_diagnosis.row(name).bias.verdict in ("none seen", "underpowered", "reference"), name
        assert ink_diagnosis.row(name).is_unbiased


@pytest.mark.medium
def test_noise_is_ordered_and_the_rows_are_complete(ink_diagnosis):
    std = {row.name: row.std.value for row in ink_diagnosis.rows}
    assert std["full_bp"] < std["rlr K=2"] < std["ddpo"]
    efficiencies = [row.efficiency.value for row in ink_diagnosis.rows]
    assert efficiencies == sorted(efficiencies, reverse=True)
    for row in ink_diagnosis.rows:
        assert row.num_batches == (4 if "control" in row.name else 6)  # two batches fit the control variate
        assert row.seconds > 0
        assert row.peak_bytes > 0
    assert ink_diagnosis.row("rlr K=2").is_yours
    assert ink_diagnosis.row("rlr K=2").speed == Estimate(1.0, 0.0)
    assert ink_diagnosis.row("sqdf").peak_bytes > ink_diagnosis.row("ddpo").peak_bytes  # it differentiates the decoder


@pytest.mark.medium
def test_the_profile_is_that_of_the_chain(ink_diagnosis):
    profile = ink_diagnosis.profile
    assert profile.stds == sorted(profile.stds, reverse=True)
    assert profile.lr_variance[-1] > 3 * profile.fo_variance[-1]  # the likelihood ratio is noisiest where the noise is least
    assert len(profile.total_variance) == 5
    assert all(v > 0 for v in profile.total_variance)
    assert profile.std_zo > profile.std_ho > 0
    ho, zo = ink_diagnosis.step_costs["ho"], ink_diagnosis.step_costs["zo"]
    assert ho.peak_bytes >= ho.held_bytes > zo.peak_bytes > 0  # a graph holds more than a step without one
    assert zo.held_bytes == 0


@pytest.mark.medium
def test_the_table_and_the_file(ink_diagnosis):
    text = ink_diagnosis.table()
    for row in ink_diagnosis.rows:
        assert any(line.startswith(f"{row.name} ") for line in text.splitlines())
    assert ink_diagnosis.recommendation.reason in text
    found = json.loads(ink_diagnosis.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [row["name"] for row in found["rows"]] == [row.name for row in ink_diagnosis.rows]
    assert found["versions"]["torch"]


@pytest.mark.slow
def test_a_black_box_reward_is_held_against_the_likelihood_ratio(make_trainer):
    trainer = make_trainer(reward_function=jpeg_compressibility, estimator="ddpo")
    diagnosis = diagnose(trainer, num_batches=1, time_limit=600)
    assert diagnosis.settings["black_box"] == BLACK_BOX
    assert diagnosis.settings["reference"] == "likelihood ratio (ddpo)"
    assert {row.fo_steps for row in diagnosis.rows} == {0}
    assert diagnosis.row("ddpo").is_yours
    assert BLACK_BOX in diagnosis.notes[0]
    assert any("rescales" in note for note in diagnosis.notes)  # ddpo's default advantage is normalized
    assert diagnosis.recommendation.plan is None  # one batch is no measurement
    assert "longer time_limit" in diagnosis.recommendation.reason


@pytest.mark.slow
def test_a_partly_detached_reward_is_found_out(make_trainer):
    """Its graph says the opposite of its values: the likelihood ratio follows the values."""

    def torn(images, prompts, metadata):
        brightness = images.mean((1, 2, 3))
        return 4 * brightness.detach() - 3 * brightness

    trainer = make_trainer(reward_function=torn, per_device_train_batch_size=8)
    diagnosis = diagnose(trainer, num_batches=20, time_limit=600, candidates=candidates_of({"rlr": {"fo_steps": 2}}, 4))
    assert diagnosis.row("rlr").bias.verdict == "biased"
    assert "cannot be relied on" in diagnosis.recommendation.reason
    assert any("cut from its graph" in remark for remark in diagnosis.recommendation.remarks)


@pytest.mark.medium
def test_a_short_time_limit_is_kept_and_said(make_trainer):
    started = time.perf_counter()
    diagnosis = diagnose(make_trainer(reward_function=ink), time_limit=1.0)
    assert time.perf_counter() - started < 30  # the first batch and the costs of the steps are measured whatever the limit
    assert any("time_limit=1 s does not allow it" in note for note in diagnosis.notes)


@pytest.mark.medium
def test_a_chain_whose_last_steps_add_no_noise(make_trainer):
    trainer = make_trainer(reward_function=ink, sample_eta=0.0, estimator="full_bp", recompute="graph")
    diagnosis = diagnose(trainer, num_batches=2, time_limit=600, candidates=candidates_of({"full_bp": {}, "draft": {}}, 4))
    assert diagnosis.row("full_bp").peak_bytes > 2 * diagnosis.row("draft").peak_bytes  # four steps in one graph
    assert diagnosis.profile.total_variance[:4] == [None] * 4
    assert diagnosis.profile.total_variance[4] is not None


@pytest.mark.parametrize("options", [{"time_limit": 0}, {"time_limit": -1.0}, {"num_batches": 0}])
def test_limits_that_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        diagnose(None, **options)


@pytest.mark.medium
def test_the_command_line_writes_prints_and_shows_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "model: digits\nreward: ink\nprompts: a handwritten digit\nsample_num_steps: 2\nsample_guidance_scale: 1.0\n"
        "per_device_train_batch_size: 2\nuse_cpu: true\nlora_r: 2\n"
    )
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    arguments = ["diagnose", "--config", "run.yaml", "--time_limit", "600", "--num_batches", "2", "--output_dir", "found"]
    assert main([*arguments, "--fo_steps", "1"]) == 0
    captured = capsys.readouterr()
    assert "rlr K=1 (yours)" in captured.out
    assert "diagnosing: batch 2" in captured.err
    assert json.loads((tmp_path / "found/diagnosis.json").read_text())["settings"]["num_steps"] == 2
    assert main([*arguments, "--fo_step", "1"]) == 2
    assert "did you mean 'fo_steps'" in capsys.readouterr().err


# ---- candidates ----


def own_of(**options):
    config = RLRConfig(use_cpu=True, **({"per_device_train_batch_size": 8, "sample_num_steps": 10} | options))
    return Candidate("yours", config.plan, {"estimator": config.estimator})


def test_the_usual_candidates():
    candidates, notes = default_candidates(own_of(), [0.5] * 10, 8, 1, True)
    assert [c.name for c in candidates] == [
        "rlr K=3 (yours)", "full_bp", "ddpo", "sqdf", "rlr K=1", "rlr K=5", "rlr K=3 control variate", "draft K=1", "rlr K=3 h=2",
        "rlr K=1 h=2", "rlr K=5 h=2", "rlr_paper", "es",
    ]  # fmt: skip
    assert notes == []
    for candidate in candidates:
        config = RLRConfig(use_cpu=True, per_device_train_batch_size=8, sample_num_steps=10, **candidate.options)
        assert config.plan == candidate.plan  # can be pasted into a config


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("differentiable", [True, False])
def test_candidates_fit_short_chains(num_steps, differentiable):
    candidates, _ = default_candidates(own_of(sample_num_steps=num_steps), [0.5] * num_steps, 8, 1, differentiable)
    assert len(candidates) == len({repr(c.plan) for c in candidates}) >= 2


def test_what_cannot_be_measured_is_left_out_with_a_note():
    _, notes = default_candidates(own_of(), [0.5] * 10, 8, 1, False)
    assert notes[0].startswith("yours was left out: it needs a differentiable reward")
    assert "black box" in notes[-1]
    candidates, notes = default_candidates(own_of(), [0.5] * 9 + [0.0], 8, 1, True)
    assert any(note.startswith("ddpo was left out: step 9 of 10 adds no noise") for note in notes)
    assert "ddpo" not in [c.name for c in candidates]


def test_configured_options_say_what_auto_chose(make_trainer):
    with untouched(make_trainer(fo_steps="auto", zo_scale=0.05)) as bench:
        assert bench.configured_options == {"estimator": "rlr", "fo_steps": bench.plan.fo_steps, "zo_scale": 0.05}


def test_perturbations_fit_the_batch():
    assert zeroth_order_options({}, 8, 1) == {"zo_num_perturbations": 4, "zo_antithetic": True}
    assert zeroth_order_options({}, 6, 2) == {"zo_num_perturbations": 3, "zo_antithetic": True}
    assert zeroth_order_options({}, 6, 3) == {"zo_num_perturbations": 3, "zo_antithetic": False}
    assert zeroth_order_options({}, 5, 1) == {"zo_num_perturbations": 1, "zo_antithetic": False}
    assert zeroth_order_options({"zo_scale": 0.05, "zo_num_perturbations": 2}, 8, 1)["zo_scale"] == 0.05


# ---- recommendation ----


def row(
    name, efficiency, *, error=0.0, fo_share=0.1, biases=(), verdict="none seen", value=None, batches=20, captured=1.0,
    largest_share=0.1,
):  # fmt: skip
    number, known = Estimate(efficiency, error), Estimate(1.0, 0.1)
    return PlanRow(
        name=name, options={"estimator": name}, is_yours=name == "mine", sampled_otherwise=False, fo_steps=round(10 * fo_share), ho_length=0,
        fo_share=fo_share, biases=list(biases), only_smoothed=False, num_batches=batches,
        bias=RelativeBias(value, None if value is None else 0.02, 0.3, verdict), captured=Estimate(captured, 0.1), std=known,
        largest_share=largest_share, seconds=1.0, peak_bytes=1, efficiency=number,
        signal_per_second=number, speed=number,
    )  # fmt: skip


def test_the_most_efficient_unbiased_plan_is_recommended():
    rows = [row("mine", 1.0), row("better", 5.0), row("best", 9.0, fo_share=0.3)]
    assert recommend(rows).plan == "best"
    assert "9 +- 0 times that of your plan" in recommend(rows).reason
    assert "it is your plan" in recommend(rows[:1]).reason
    unknown = dataclasses.replace(rows[2], speed=Estimate(None, None))
    assert "an unknown number of times that of your plan" in recommend([unknown]).reason
    assert recommend([row("mine", 1.0, batches=4)]).plan is None  # too few batches


def test_a_biased_plan_is_never_recommended_and_its_bias_is_stated():
    biased = row("sqdf", 100.0, biases=["stands in"], verdict="biased", value=0.35)
    recommendation = recommend([row("mine", 1.0), biased])
    assert recommendation.plan == "mine"
    remark, risk = recommendation.remarks
    assert "biased alternative: sqdf has 1e+02 times" in remark
    assert "measured bias over the gradient's norm: 0.35 +- 0.02" in remark
    assert "judge" in risk
    assert recommend([biased]).plan is None
    unresolved = row("sqdf", 100.0, biases=["stands in"], verdict="underpowered")
    assert "norm: < 0.3?" in recommend([row("mine", 1.0), unresolved]).remarks[0]
    # one that captures nothing is not mentioned
    assert recommend([row("mine", 1.0), row("draft", 1e6, biases=["leaves"], captured=0.1)]).remarks == []


def test_long_first_order_is_mentioned_with_its_risk_but_not_recommended():
    recommendation = recommend([row("mine", 1.0), row("full_bp", 50.0, fo_share=1.0)])
    assert recommendation.plan == "mine"
    assert "full_bp (K=10), unbiased, with 50 times" in recommendation.remarks[0]
    assert "independent judge" in recommendation.remarks[1]
    assert "whose risk is not measured" in recommend([row("full_bp", 1.0, fo_share=1.0)]).reason


@pytest.mark.parametrize("other", [
    row("ddpo", 0.028, error=0.6, fo_share=0.0),  # equal within the errors, and measured as worse
    row("ddpo", 3.0, error=0.7, fo_share=0.0),  # better, by less than three errors
    row("ddpo", 9.0, fo_share=0.0, batches=9),
    row("ddpo", 9.0, fo_share=0.0, largest_share=0.9),
])  # fmt: skip
def test_what_is_not_better_beyond_doubt_leaves_the_configured_plan(other):
    recommendation = recommend([row("mine", 1.0, fo_share=0.3), other])
    assert recommendation.plan == "mine"
    assert ("Not enough data for another plan, keep yours" in recommendation.reason) == (other.efficiency.value > 1)
    # nor is a plan that measured worse put in the place of a biased one, or of long first order
    for mine in (row("mine", 1.0, fo_share=1.0), row("mine", 1.0, biases=["leaves"])):
        assert recommend([mine, dataclasses.replace(other, speed=Estimate(0.5, 0.6), efficiency=Estimate(0.5, 0.6))]).plan != "ddpo"


def test_a_std_that_is_mostly_of_one_batch_is_called_rough():
    heavy = row("full_bp", 50.0, fo_share=1.0, largest_share=0.83)
    settings = {"reference_batches": 20, "reference_norm": 1.0, "reference_resolved": True}
    settings |= dict.fromkeys(("advantage", "configured_advantage"), "none")
    (note,) = notes_on_power([row("mine", 1.0), heavy], settings)
    assert "comes from one batch, so std and signal/s are rough: full_bp (83%)" in note
    assert not row("of few batches", 1.0, batches=4, largest_share=0.9).is_heavy_tailed


def test_among_equals_the_fewest_first_order_steps():
    rows = [row("long", 10.0, error=1.0, fo_share=0.5), row("short", 9.0, error=1.0, fo_share=0.2)]
    assert recommend(rows).plan == "short"
    assert "2 are equal" in recommend(rows).reason
    rows[0] = row("long", 20.0, error=1.0, fo_share=0.5)
    assert recommend(rows).plan == "long"


def test_an_unbiased_plan_that_measured_biased_is_not_trusted():
    wrong = row("ddpo", 9.0, verdict="biased", value=0.9)
    recommendation = recommend([row("mine", 1.0), wrong])
    assert recommendation.plan == "mine"
    assert "detach" in recommendation.remarks[0]
    assert "cannot be relied on" in recommend([wrong]).reason


@pytest.mark.parametrize(
    ("bias", "text"),
    [
        (RelativeBias(0.981, 0.031, 1.0, "biased"), "0.981 +- 0.031"),
        (RelativeBias(None, None, 0.4, "none seen"), "< 0.4"),
        (RelativeBias(None, None, 9.0, "underpowered"), "< 9?"),
        (RelativeBias(None, None, None, "underpowered"), "?"),
        (RelativeBias(None, None, 0.0, "reference"), "reference"),
    ],
)
def test_biases_say_how_sure_they_are(bias, text):
    assert format_bias(bias) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.34, 1.0, "12.3 +- 1"),
        (1.0, 0.8, "1 +- 0.8?"),
        (None, None, "-"),
        (3.0, None, "3?"),
        (0.0, 0.0, "0 +- 0"),
        (1.234e-9, 1e-10, "1.23e-09 +- 1e-10"),
    ],
)
def test_numbers_say_how_sure_they_are(value, error, text):
    assert format_estimate(Estimate(value, error)) == text


# ---- the orderings of the design's table ----


@pytest.mark.slow
def test_the_orderings_on_the_bundled_model(digits_pipeline_master, tmp_path):
    """Ten steps, the demo's reward: sqdf < rlr K=3 < rlr K=1 <= ddpo < es in noise.

    Left out: the std of full_bp is that of its rarest updates (the test below), and what is relative to the reference needs more batches
    than a test can have here; the smaller models above test it.
    """
    config = RLRConfig(
        output_dir=str(tmp_path), sample_num_steps=10, sample_guidance_scale=1.0, per_device_train_batch_size=16, lora_r=4,
        zo_scale=0.05, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = RLRTrainer(config, digit_reward(7), lambda: (digits.PROMPT, {}), copy.deepcopy(digits_pipeline_master))
    options = {
        "sqdf": {}, "rlr K=3": {"fo_steps": 3}, "rlr K=1": {"fo_steps": 1}, "ddpo": {}, "es": {"zo_scale": 0.05, "zo_antithetic": False},
    }  # fmt: skip
    diagnosis = diagnose(trainer, num_batches=20, time_limit=3600, candidates=candidates_of(options, 10))  # the batches end it
    assert {row.name: row.num_batches for row in diagnosis.rows} == dict.fromkeys(options, 20)
    assert not any(row.is_heavy_tailed for row in diagnosis.rows)
    std = {row.name: row.std.value for row in diagnosis.rows}
    assert 2.0 * std["sqdf"] < std["rlr K=3"]
    assert 2.0 * std["rlr K=3"] < std["rlr K=1"]
    assert std["rlr K=1"] < 1.1 * std["ddpo"]
    assert 3.0 * std["ddpo"] < std["es"]


@pytest.mark.slow
def test_a_sketched_gradient_gives_the_same_answers(make_trainer, monkeypatch):
    def total_variance():
        with untouched(make_trainer(reward_function=ink)) as bench:
            return build_profile(bench, Deadline(600), 3).build().total_variance

    exact = total_variance()
    monkeypatch.setattr("rlr_trainer.diagnosis.gradients.MAX_ENTRIES", 2**11)
    sketched = total_variance()
    assert sketched != exact
    assert sketched == pytest.approx(exact, rel=0.3)


@pytest.mark.slow
def test_typical_updates_of_full_bp_are_small(monkeypatch):
    """By factors of thousands, on the bundled model; its rare ones are not, so nothing is said of its std."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    norms = importlib.import_module("gradient_tails").norms(batches=15, seed=0)
    assert {name: len(values) for name, values in norms.items()} == {"full_bp": 15, "rlr": 15, "ddpo": 15}
    median = {name: float(values.median()) for name, values in norms.items()}
    assert 10 * median["full_bp"] < median["rlr"]
    assert 2 * median["rlr"] < median["ddpo"]
