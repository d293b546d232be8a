import dataclasses
import json
import threading
from pathlib import Path

import pytest

from turnwise import compare
from turnwise.config import TrainConfig
from turnwise.errors import ConfigError, RunError
from turnwise.report.data import load_run
from turnwise.rundir import create_run


def record(estimator: str, seed: int, exact_match: float) -> dict:
    names = ("tool_execution", "answer_in_results", "xml_format", "f1")
    metrics = {name: {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10} for name in names}
    metrics["exact_match"] = {"mean": exact_match, "low": 0.0, "high": 1.0, "n": 10}
    return {
        "arm": estimator,
        "estimator": estimator,
        "seed": seed,
        "steps": 2,
        "evaluations": {"held-out-greedy": metrics},
    }


def result() -> dict:
    runs = [record("grpo-or", 0, 0.1), record("mt-grpo", 0, 0.5), record("mt-grpo", 1, 0.7)]
    return {
        "name": "toy",
        "turnwise": "0",
        "torch": "0",
        "machine": "x86_64",
        "date": "2026-01-01",
        "config": {"steps": 2, "tasks_per_step": 3, "group_size": 4},
        "start": {
            "evaluations": {"held-out-greedy": record("", 0, 0.05)["evaluations"]["held-out-greedy"]},
            "raw_question_answer_in_results": {"held-out": 0.25},
        },
        "runs": runs,
    }


def test_the_table_shows_mean_and_range_over_seeds() -> None:
    lines = compare.markdown(result()).splitlines()
    assert "| start | | 0.500 | 0.500 | 0.500 | 0.050 | 0.500 |" in lines
    assert "| GRPO-OR | 1 | 0.500 | 0.500 | 0.500 | 0.100 | 0.500 |" in lines
    mt_grpo = next(line for line in lines if line.startswith("| MT-GRPO | 2"))
    assert "0.600 (0.500-0.700)" in mt_grpo  # (0.5 + 0.7) / 2
    assert "The question itself as query: answer in results 0.250." in lines


def test_results_name_data_files_without_their_folders(tmp_path: Path) -> None:
    config = compare.ReproduceConfig(
        name="toy", results=tmp_path, train=TrainConfig(tasks="/somewhere/of/mine/questions.jsonl")
    )
    written = compare.write_results(config, result()["start"], result()["runs"])
    data = json.loads(written.read_text())
    assert data["config"]["tasks"] == "questions.jsonl"
    assert "somewhere" not in written.read_text()
    assert data["arms"]["mt-grpo"] == {"estimator": "mt-grpo"}
    assert written.with_suffix(".md").is_file()


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="mt-grpo"):
        compare.ReproduceConfig(estimators=("mt-grp",))


def test_a_file_of_arms_names_the_options_of_each(tmp_path: Path) -> None:
    file = tmp_path / "arms.toml"
    file.write_text(
        '[mt]\nestimator = "mt-grpo"\nalpha = 0.5\n'
        '[paid]\nestimator = "grpo-mr"\nreward-weights = {exact_match = 2.0}\n'
    )
    arms = compare.read_arms(compare.ReproduceConfig(arms=file, train=TrainConfig(steps=7)))
    assert [(a.estimator, a.alpha, a.steps) for a in arms.values()] == [("mt-grpo", 0.5, 7), ("grpo-mr", 1.0, 7)]
    assert arms["paid"].reward_weights == {"exact_match": 2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name methods"),
        ("steps = 3", "table of training options"),
        ('["../x"]\nsteps = 3', "table of training options"),
        ('[mt]\nestimatr = "mt-grpo"', "estimator"),
        ("[mt]\nsteps = 0", "steps must be"),
    ],
)
def test_a_wrong_file_of_arms_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "arms.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        compare.read_arms(compare.ReproduceConfig(arms=file))


@pytest.mark.slow
def test_a_whole_comparison_leaves_runs_that_a_report_can_show(tmp_path: Path) -> None:
    small = TrainConfig(steps=2, tasks_per_step=1, group_size=2, validation_size=2, minibatches=1)
    config = compare.ReproduceConfig(
        name="toy", results=tmp_path, runs=tmp_path / "runs", estimators=("grpo-or", "mt-grpo"), seeds=1, eval_size=3,
        train=small,
    )  # fmt: skip
    written = json.loads(compare.reproduce(config).read_text())
    assert [r["estimator"] for r in written["runs"]] == ["grpo-or", "mt-grpo"]
    assert set(written["start"]["raw_question_answer_in_results"]) == {"seen", "held-out"}
    run = load_run(tmp_path / "runs" / "toy" / "mt-grpo-0")
    start, end = (
        next(e.means for e in run.evaluations if (e.name, e.mode) == (name, "greedy"))
        for name in ("held-out-start", "held-out")
    )
    assert start["exact_match"] == written["start"]["evaluations"]["held-out-greedy"]["exact_match"]["mean"]
    assert end["exact_match"] == written["runs"][1]["evaluations"]["held-out-greedy"]["exact_match"]["mean"]
    assert json.loads(compare.reproduce(config).read_text())["runs"] == written["runs"]  # finished runs are kept


def test_every_method_and_seed_is_run_once_and_finished_runs_are_kept(tmp_path: Path, monkeypatch) -> None:
    done = tmp_path / "runs" / "toy" / "mt-grpo-0"
    done.mkdir(parents=True)
    (done / "record.json").write_text(json.dumps(record("mt-grpo", 0, 0.5)))
    assert compare.run_one(TrainConfig(out=done), 10) == record("mt-grpo", 0, 0.5)


def test_the_way_there_is_shown_by_steps() -> None:
    found = result()
    for run, level in zip(found["runs"], (0.25, 0.5, 1.0), strict=True):
        run["curve"] = {"tool_execution": [level, level, 0.0], "exact_match": [0.0, 0.0, level]}
    lines = compare.markdown(found).splitlines()
    assert "| steps | 1-2 | 3 |" in lines
    assert "| tool execution, GRPO-OR | 0.25 | 0.00 |" in lines
    assert "| exact match, MT-GRPO | 0.00 | 0.75 |" in lines  # (0.5 + 1) / 2


def searching(arm: str, seed: int, exact_match: list[float]) -> dict:
    """A run of ten steps under protocol `search`: a step more searches each, every other one useful."""
    curve = {"exact_match": exact_match, "searches": [1.0 + i for i in range(10)]}
    curve |= {"useful_searches": [0.5] * 10, "redundant_searches": [None, *[0.25] * 9]}
    curve |= {"explained_variance": [0.25] * 10, "sampled_tokens": [1250.0 * (1 + i) for i in range(10)]}
    metrics = {"exact_match": {"mean": 0.5}, "f1": {"mean": 0.5}, "searches": {"mean": 2.0}}
    return {"arm": arm, "seed": seed, "evaluations": {"held-out-greedy": metrics}, "curve": curve}


def test_searches_are_shown_over_training_and_collapsed_runs_are_named() -> None:
    steady, lost = [0.2 * (i // 2) for i in range(10)], [0.0, 0.2, 0.6, 0.8, 0.6, 0.6, 0.3, 0.3, 0.1, 0.3]
    found = result()
    found["config"] |= {"protocol": "search", "token_budget": 12_000}
    found["arms"] = {"mt-ppo": {"estimator": "mt-ppo"}, "ppo-or": {"estimator": "ppo-or", "reward_weights": {}}}
    found["start"]["evaluations"] = {"held-out-greedy": searching("", 0, steady)["evaluations"]["held-out-greedy"]}
    found["runs"] = [searching("mt-ppo", 0, steady), searching("ppo-or", 0, steady), searching("ppo-or", 1, lost)]
    lines = compare.markdown(found).splitlines()
    assert "| MT-PPO | 1 | - | - | 2.000 | - | - | 0.500 | 0.500 |" in lines  # what a run does not have is a dash
    #  fifths of two steps. Searches: (1 + 2) / 2, (5 + 6) / 2, (9 + 10) / 2; exact match of both seeds: (0 + .1) / 2,
    #  (.4 + .6) / 2, (.8 + .2) / 2
    assert "| PPO-OR | 1.50 | 5.50 | 9.50 | 0.50 | 0.50 | 0.50 | 0.25 | 0.25 | 0.25 | 0.05 | 0.50 | 0.50 |" in lines
    assert any(line.startswith("Collapsed") and line.endswith(": PPO-OR seed 1.") for line in lines)  # .2 < .7 / 2
    assert "* PPO-OR: 10 steps, 12,500 sampled tokens; explained variance at the end 0.25; reward_weights {}" in lines
    assert "* MT-PPO: 10 steps, 12,500 sampled tokens; explained variance at the end 0.25" in lines
    assert lines[-1].startswith("12,000 sampled tokens, 3 questions x 4 rollouts a step; ")


def test_a_run_that_no_longer_uses_the_tool_has_collapsed() -> None:
    #  fifths of one step; exact match was never there to lose
    assert compare.has_collapsed({"exact_match": [0.1] * 5, "tool_execution": [0.4, 0.6, 0.5, 0.4, 0.2]})
    assert not compare.has_collapsed({"exact_match": [0.1] * 5, "tool_execution": [0.4, 0.6, 0.5, 0.4, 0.3]})


def test_a_short_run_has_as_many_parts_as_steps() -> None:
    assert compare._parts([0.25, None, 0.75]) == [0.25, 0.75]
    assert compare._parts([float(i) for i in range(12)]) == [0.5, 2.5, 5.0, 7.5, 10.0]  # of 2, 2, 3, 2 and 3 steps


def test_a_step_without_live_rollouts_has_no_entropy_in_the_curve(tmp_path: Path) -> None:
    names = ("tool_execution", "answer_in_results", "exact_match", "return", "dead_groups")
    alive = {"step": 1, "split": "train", "metrics": {**dict.fromkeys(names, 0.5), "entropy": 0.25}}
    dead = {"step": 2, "split": "train", "metrics": dict.fromkeys(names, 1.0)}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(alive)}\n{json.dumps(dead)}\n")
    curve = compare._curve(tmp_path)
    assert curve["entropy"] == [0.25, None]
    assert curve["exact_match"] == [0.5, 1.0]


def test_a_stopped_run_leaves_no_record(tmp_path: Path, monkeypatch) -> None:
    class Stopped:
        finished = False

    monkeypatch.setattr("turnwise.training.train", lambda *_, **__: Stopped())
    monkeypatch.setattr(compare, "_is_stopping", threading.Event())
    with pytest.raises(KeyboardInterrupt):
        compare.run_one(TrainConfig(out=tmp_path / "run"), 10)
    assert compare._is_stopping.is_set(), "what is queued must not be begun"
    monkeypatch.setattr("turnwise.training.train", lambda *_, **__: pytest.fail("begun"))
    with pytest.raises(KeyboardInterrupt):
        compare.run_one(TrainConfig(out=tmp_path / "next"), 10)
    assert not (tmp_path / "run" / "record.json").exists()


def test_a_run_of_other_options_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "mt-grpo-0"
    config = TrainConfig(out=out)
    create_run(out, dataclasses.replace(config, reward_weights=dict(config.weights), threads=1))
    (out / "record.json").write_text(json.dumps({**record("mt-grpo", 0, 0.5), "eval_size": 10}))
    assert compare.run_one(config, 10)["seed"] == 0
    with pytest.raises(ConfigError, match=r"learning-rate must be that of the run in .*, 0\.0005; got 0\.01"):
        compare.run_one(dataclasses.replace(config, learning_rate=0.01), 10)
    with pytest.raises(ConfigError, match=r"eval-size must be that of the finished run in .*, 10; got 20"):
        compare.run_one(config, 20)


def test_arms_share_what_is_compared_and_need_not_fit_the_default_methods(tmp_path: Path) -> None:
    file = tmp_path / "arms.toml"
    file.write_text('[tree]\nestimator = "mt-grpo-tree"\n')
    shared = TrainConfig(estimator="mt-grpo-tree", branches=(2, 2))
    assert compare.read_arms(compare.ReproduceConfig(arms=file, train=shared))["tree"].branches == (2, 2)
    file.write_text('[other]\nestimator = "mt-grpo"\nprotocol = "search"\n')
    with pytest.raises(ConfigError, match=r"\[other\] must not set protocol"):
        compare.read_arms(compare.ReproduceConfig(arms=file))


@pytest.mark.parametrize("name", ["a/b", "", "../x"])
def test_a_result_must_have_a_files_name(name: str) -> None:
    with pytest.raises(ConfigError, match="name must be letters"):
        compare.ReproduceConfig(name=name)


@pytest.mark.slow
def test_a_comparison_ends_with_the_first_run_that_fails(tmp_path: Path) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def outcome_nothing(task, rollout):\n    return float('nan')\n")
    small = TrainConfig(
        steps=2, tasks_per_step=1, group_size=2, validation_size=2, minibatches=1, rewards=rewards, reward_weights={}
    )
    config = compare.ReproduceConfig(
        name="toy", results=tmp_path, runs=tmp_path / "runs", estimators=("mt-grpo",), seeds=4, jobs=1, eval_size=2,
        train=small,
    )  # fmt: skip
    with pytest.raises(RunError, match="finite"):
        compare.reproduce(config)
    assert len(list((tmp_path / "runs" / "toy").iterdir())) <= 2, "the others are not begun"
