"""Comparisons out of one file: what the file may say, what its runs say about each other, and a whole one."""

import dataclasses
import io
import itertools
import json
from pathlib import Path

import pytest
from numpy.testing import assert_allclose
from rich.console import Console

from turnwise import compare, designs
from turnwise.compare import check_arms, result_head, run_configs
from turnwise.config import BRANCHING, TRAINABLE, TrainConfig
from turnwise.credit import NEEDS
from turnwise.display import comparison_table
from turnwise.errors import ConfigError, InputError
from turnwise.report.data import load_run
from turnwise.report.tables import estimator_order
from turnwise.rundir import write_config

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
CHECKED: set[tuple] = set()
FILES = sorted(path for path in EXPERIMENTS.glob("*.toml") if path.name != "two-hop.toml")
TEXT = """
[shared]
name = "toy"
seeds = 2
eval-size = 3
baseline = "merged"
thresholds = { exact_match = 0.5 }
steps = 7

[merged]
estimator = "grpo-mr"

[turns]
estimator = "mt-grpo"
alpha = 0.5
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "design.toml"
    file.write_text(text)
    return file


def test_a_file_says_all_of_a_comparison(tmp_path: Path):
    design = designs.read_design(written(tmp_path, TEXT), jobs=3)
    assert [(a.estimator, a.alpha, a.steps) for a in design.arms.values()] == [("grpo-mr", 1.0, 7), ("mt-grpo", 0.5, 7)]
    assert (design.name, design.seeds, design.jobs, design.eval_size) == ("toy", 2, 3, 3)
    assert design.baselines == {"merged": "merged", "turns": "merged"}
    assert design.thresholds == {"exact_match": 0.5}


def test_an_arm_may_have_a_baseline_of_its_own(tmp_path: Path):
    text = '[a]\n[b]\n[c]\nbaseline = "b"\n[d]\n[e]\nbaseline = "a"\n'
    design = designs.read_design(written(tmp_path, text))
    assert design.baselines == {"a": "a", "b": "b", "c": "b", "d": "a", "e": "a"}
    assert design.name == "design"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 7", "seed = 7", r"\[shared\] must not set seed: the comparison decides it"),
        ("alpha = 0.5", "steps = 9", r"\[turns\] must not set steps: arms share it; got 9"),
        ("alpha = 0.5", "token-budget = 9", r"\[turns\] must not set token-budget: arms share it"),
        ("alpha = 0.5", 'protocol = "search"', r"\[turns\] must not set protocol"),
        ("alpha = 0.5", "alpha = 2", r"alpha must be in \[0, 1\]"),
        ('"merged"', '"merge"', "a baseline in .* must be a known name; got 'merge'; did you mean merged"),
        ("seeds = 2", "seeds = 0", "seeds in .* must be a whole number of 1 or more; got 0"),
        ("eval-size = 3", "eval-size = true", "eval-size in .* must be a whole number"),
        ("{ exact_match = 0.5 }", "0.5", "thresholds in .* must be a table of numbers"),
        (
            "exact_match =",
            "exact_mach =",
            "a metric with a threshold in .*; got 'exact_mach'; did you mean exact_match",
        ),
        ('name = "toy"', 'name = "../toy"', "name in .* must be letters"),
        ("[shared]", "x = 1\n[shared]", r"must hold a table \[shared\] and one for each arm"),
        ("steps = 7", "stepz = 7", "stepz"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(InputError, match=message):
        designs.read_design(written(tmp_path, TEXT.replace(old, new, 1)))


def test_a_file_without_arms_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="must have arms"):
        designs.read_design(written(tmp_path, "[shared]\nsteps = 3\n"))


# --------------------------------------------------------------------------------- the files that are there


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_ready_made_design_can_be_run(file: Path):
    design = designs.read_design(file)
    assert f"turnwise compare experiments/{file.name}" in file.read_text(encoding="utf-8")
    assert design.name == file.stem
    assert all(a != b for a, b in itertools.combinations(design.arms.values(), 2)), "arms differ"
    for arm in design.arms.values():
        kind = (arm.tasks, arm.protocol, bool(arm.branches), *sorted(arm.weights.items()))
        if kind not in CHECKED:  # the settings of the others are the same
            check_arms([arm])
            CHECKED.add(kind)


def test_the_zoo_has_estimators_of_every_kind_without_a_critic():
    names = {arm.estimator for arm in designs.read_design(EXPERIMENTS / "zoo.toml").arms.values()}
    assert {"grpo-or", "grpo-mr", "mt-grpo"} <= names <= {*TRAINABLE, *BRANCHING}
    assert {column for name in names for column in NEEDS.get(name, ())} == {"tokens", "anchor", "node"}


# ----------------------------------------------------------------------------- what runs say about each other


def run(arm: str, seed: int, curve: list[float], final: float) -> dict:
    """A run that samples 100 tokens a step."""
    steps = len(curve)
    return {
        "arm": arm,
        "seed": seed,
        "evaluations": {"held-out-greedy": {"exact_match": {"mean": final}}},
        "curve": {
            "exact_match": curve,
            "tool_execution": [1.0] * steps,
            "sampled_tokens": [100.0 * (i + 1) for i in range(steps)],
        },
        "cost": {
            "sampled_tokens": 100.0 * steps, "environment_calls": 7.0 * steps, "update_flops": 2e12 * steps,
            "rollout_s": 3.0 * steps, "update_s": 4.0 * steps,
        },
    }  # fmt: skip


SLOW, FAST, LOST = [0.0, 0.0, 0.3, 0.6, 0.9, 0.9], [0.6, 0.6, 0.6, 0.9, 0.9, 0.9], [0.3, 0.9, 0.6, 0.3, 0.3, 0.0]
RUNS = [
    *(run("base", seed, SLOW, 0.5 + seed / 100) for seed in range(6)),
    *(run("fast", seed, FAST, 0.75 + seed / 100) for seed in (5, 4, 3, 2, 1)),
    run("fast", 0, LOST, 0.0),
]


def compared(**options) -> dict:
    return designs.compared(RUNS, {"base": "base", "fast": "base"}, {"exact_match": 0.6}, **options)


def test_arms_are_paired_by_seed_whatever_the_order_of_the_runs():
    found = compared()["fast"]["differences"]["held-out-greedy/exact_match"]
    assert_allclose(found["differences"], [-0.5, 0.25, 0.25, 0.25, 0.25, 0.25])
    assert_allclose(found["mean"], 0.75 / 6)
    assert (found["wins"], found["losses"]) == (5, 1)
    assert found["p"] == 2 * (1 + 6) / 64
    assert found["interval"]["low"] < 0 < found["interval"]["high"]


def test_collapses_are_counted_with_what_they_say_of_the_probability():
    found = compared()
    assert found["base"]["collapsed"] == {"count": 0, "of": 6, "low": 0.0, "high": round(1 - 0.025 ** (1 / 6), 4)}
    assert found["fast"]["collapsed"]["count"] == 1


def test_a_threshold_is_reached_or_the_run_is_censored():
    #  means of three steps: slow .1, .3, .6, .8 from step 3 on, so at step 5; fast .6 at step 3; the lost one too
    found = compared()
    steps = found["fast"]["reached"]["exact_match"]["steps"]
    assert [time["at"] for time in steps["by_seed"]] == [3.0] * 6
    assert steps["median"] == {"at": 3.0, "reached": True}
    assert (steps["earlier"], steps["later"]) == (6, 0)
    assert steps["p"] == 2 / 64
    assert found["base"]["reached"]["exact_match"]["tokens"]["median"] == {"at": 500.0, "reached": True}
    never = designs.compared(RUNS, {"base": "base", "fast": "base"}, {"exact_match": 0.95})["fast"]["reached"]
    assert never["exact_match"]["tokens"]["median"] == {"at": 600.0, "reached": False}
    assert never["exact_match"]["tokens"]["p"] == 1.0


def test_areas_are_over_steps_or_up_to_the_budget():
    assert_allclose(compared()["base"]["area"]["exact_match"], [2.7 / 6] * 6)
    assert_allclose(compared(token_budget=400)["base"]["area"]["exact_match"], [0.9 / 4] * 6)  # two steps lie beyond


def test_a_threshold_of_an_unknown_metric_is_refused():
    with pytest.raises(ConfigError, match=r"a metric with a threshold must be a known name; got 'exact_mach'"):
        designs.compared(RUNS, {"base": "base", "fast": "base"}, {"exact_mach": 0.5})


def test_the_page_shows_every_number_with_its_spread():
    evaluation = {"held-out-greedy": {"exact_match": {"mean": 0.2}}}
    result = {
        "name": "toy", "turnwise": "0", "torch": "0", "machine": "x86_64", "date": "2026-01-01",
        "config": {"steps": 6, "tasks_per_step": 3, "group_size": 4, "protocol": "search"},
        "arms": {"base": {"estimator": "grpo-mr"}, "fast": {"estimator": "mt-grpo", "alpha": 0.5}},
        "start": {"evaluations": evaluation, "raw_question_answer_in_results": {}},
        "runs": RUNS,
        "comparison": compared(),
    }  # fmt: skip
    page = designs.design_markdown(result)
    interval = result["comparison"]["fast"]["differences"]["held-out-greedy/exact_match"]["interval"]
    assert (
        f"| fast | base | exact match, held-out questions, greedy | +0.125 [{interval['low']:+.3f}, "
        f"{interval['high']:+.3f}] | -0.500 +0.250 +0.250 +0.250 +0.250 +0.250 | 5 : 1 | 0.219 (0.031) |"
    ) in page
    assert "| base | 0 of 6 | [0.00, 0.46] |" in page
    assert "| fast | 1 of 6 | [0.00, 0.64] |" in page
    assert "## until exact match of training rollouts is 0.6" in page
    assert "| fast | 6 of 6 | 3 3 3 3 3 3 | 3 | 300 | 6 : 0, p 0.031 | 6 : 0, p 0.031 |" in page
    assert "| base | 600 (600-600) | 42 (42-42) | 12 (12-12) | 18 (18-18) | 24 (24-24) |" in page
    assert "* fast: estimator mt-grpo, alpha 0.5" in page
    json.dumps(result)  # all of JSON's types
    few = designs.compared([r for r in RUNS if r["seed"] < 3], {"base": "base", "fast": "base"}, {})
    assert few["fast"]["differences"]["held-out-greedy/exact_match"]["interval"] is None
    assert "An interval takes 5 seeds; there are 3." in designs.design_markdown({**result, "comparison": few})


# ------------------------------------------------------------------------------------------ while they go


def test_the_live_table_reads_how_far_each_run_is(tmp_path: Path):
    config = TrainConfig(steps=10, token_budget=1000)
    jobs = {(arm, 0): TrainConfig(**{**vars(config), "out": tmp_path / arm}) for arm in ("a", "b", "c", "d")}
    line = {"step": 2, "split": "train", "wall_s": 9.0, "metrics": {"sampled_tokens": 450.0, "exact_match": 0.25}}
    for arm, last in (("b", line), ("c", {**line, "step": 10}), ("d", {**line, "step": 10})):
        (tmp_path / arm).mkdir()
        text = f"{json.dumps(line)}\n{json.dumps(last)}\n{json.dumps({'split': 'validation', 'step': 1})}\n"
        (tmp_path / arm / "metrics.jsonl").write_text(text + '{"step": 3, "spl')  # a line that is being written
    (tmp_path / "d" / "record.json").write_text("{}")
    found = designs.progress(jobs)
    assert [(p.arm, p.state, p.step, p.share) for p in found] == [
        ("a", "waiting", 0, 0.0),
        ("b", "training", 2, 0.45),
        ("c", "evaluating", 10, 1.0),
        ("d", "finished", 10, 1.0),
    ]
    shown = io.StringIO()
    Console(width=120, file=shown).print(comparison_table("toy", found))
    assert all(said in shown.getvalue() for said in ("1 of 4 runs finished", "25%", "45%"))


# --------------------------------------------------------------------------------------------- a whole one


SMALL = """
[shared]
name = "toy"
seeds = 2
jobs = 2
eval-size = 2
thresholds = { exact_match = 0.5 }
steps = 2
tasks-per-step = 1
group-size = 2
minibatches = 1
validation-size = 2

[merged]
estimator = "grpo-mr"

[noisy]
estimator = "mt-grpo"
outcome-noise = 0.5
tool-failures = 0.25
"""


def test_runs_of_a_comparison_have_one_thread_and_micro_batches_of_a_fixed_size(tmp_path: Path):
    arms = {"open": TrainConfig(), "own": TrainConfig(micro_batch_tokens=512)}
    jobs = run_configs(arms, 2, tmp_path)
    assert [(key, job.threads, job.micro_batch_tokens) for key, job in jobs.items()] == [
        (("open", 0), 1, 2048),
        (("own", 0), 1, 512),
        (("open", 1), 1, 2048),
        (("own", 1), 1, 512),
    ]
    assert result_head("toy", 2, arms["open"])["config"]["micro_batch_tokens"] == 2048


def test_the_start_is_evaluated_as_the_runs_are(monkeypatch: pytest.MonkeyPatch):
    seen: list[TrainConfig] = []
    monkeypatch.setattr(compare, "evaluations", lambda start, config, size: seen.append(config) or {})
    monkeypatch.setattr(compare, "raw_question_rates", lambda config, size: seen.append(config) or {})
    compare._start_record(TrainConfig(threads=4), 3)
    assert [(config.threads, config.micro_batch_tokens) for config in seen] == [(1, 2048)] * 2


def test_a_run_that_another_comparison_has_finished_is_linked_and_not_made_again(tmp_path: Path):
    runs = tmp_path / "runs"
    done = runs / "other" / "clean-1"
    done.mkdir(parents=True)
    asked = TrainConfig(estimator="mt-grpo", steps=7, seed=1, micro_batch_tokens=2048)
    write_config(done, dataclasses.replace(asked, out=done, threads=1))
    (done / "record.json").write_text(json.dumps({"eval_size": 3, "arm": "clean", "seed": 1}))
    arms = {"same": dataclasses.replace(asked, micro_batch_tokens=None), "longer": dataclasses.replace(asked, steps=8)}
    for eval_size, linked in ((4, False), (3, True)):
        jobs = run_configs(arms, 2, runs / "toy")
        (runs / "toy").mkdir(exist_ok=True)
        designs.adopt(jobs, runs, eval_size)
        assert {path.name for path in (runs / "toy").iterdir()} == ({"same-1"} if linked else set())
    assert (runs / "toy" / "same-1").resolve() == done.resolve()
    designs.adopt(jobs, runs, 3)  # what is there stays
    for name, text in (("half", "{"), ("odd", "[]"), ("bare", json.dumps({"eval_size": 3}))):
        (runs / "other" / name).mkdir()
        (runs / "other" / name / "record.json").write_text(text)
    (runs / "toy" / "longer-0").symlink_to("gone")
    designs.adopt(jobs, runs, 3)  # damaged runs are passed over, and links to what is gone are removed
    assert {path.name for path in (runs / "toy").iterdir()} == {"same-1"}


@pytest.mark.slow
def test_a_comparison_that_is_stopped_goes_on_and_leaves_what_a_report_reads(tmp_path: Path):
    design = designs.read_design(written(tmp_path, SMALL))
    folders = {"runs": tmp_path / "runs", "results": tmp_path / "results"}

    def stop(jobs) -> None:
        if any(progress.step for progress in designs.progress(jobs)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        designs.compare(design, **folders, look=stop)
    assert not list(folders["results"].glob("*.json"))
    seen = []
    path = designs.compare(design, **folders, look=lambda jobs: seen.append(designs.progress(jobs)))
    result = json.loads(path.read_text())
    assert [(r["arm"], r["seed"]) for r in result["runs"]] == [("merged", 0), ("merged", 1), ("noisy", 0), ("noisy", 1)]
    assert {p.state for p in seen[-1]} == {"finished"}
    for record in result["runs"]:
        folder = folders["runs"] / "toy" / f"{record['arm']}-{record['seed']}"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line["metrics"] for line in lines if line["split"] == "train"]
        assert len(steps) == 2  # what was done before the stop was not done again
        assert record["cost"]["sampled_tokens"] == steps[-1]["sampled_tokens"]
        assert record["cost"]["environment_calls"] == sum(step["environment_calls"] for step in steps)
        assert all(step["update_flops"] >= 0 for step in steps)
    firsts = [r["curve"]["sampled_tokens"][0] for r in result["runs"]]
    assert firsts[0] != firsts[1]  # seeds differ
    loaded = [load_run(folders["runs"] / "toy" / f"{arm}-0") for arm in ("merged", "noisy")]
    assert set(estimator_order(loaded)) == {"merged", "noisy"}  # a report tells arms apart
    assert (folders["results"] / "toy.md").read_text().startswith("# toy\n")
    again = designs.compare(design, **folders, look=lambda jobs: None)
    assert json.loads(again.read_text())["runs"] == result["runs"]  # finished runs are kept
