"""Options are checked at the door and come back from their file equal."""

import json
import math
from pathlib import Path

import pytest

from turnwise.config import CRITIC_METHODS, TrainConfig, config_from_dict, config_to_dict, read_config_file
from turnwise.errors import ConfigError, InputError


def test_the_defaults_are_valid_and_survive_json():
    config = TrainConfig()
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config))), "x") == config


def test_paths_weights_and_names_survive_json():
    config = TrainConfig(
        out=Path("a/b"), tools="t.py", rewards=Path("r.py"), reward_weights={"exact_match": 2.0}, steps=7
    )
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))), "x")
    assert again == config
    assert isinstance(again.rewards, Path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("estimator", "mt_grpo", "did you mean mt-grpo"),
        ("alpha", 1.01, r"alpha must be in \[0, 1\]; got 1.01"),
        ("alpha", math.nan, "alpha must be"),
        ("ratio", "turns", "ratio must be a known name; got 'turns'; did you mean turn"),
        ("ratio", "sequence", "got mt-grpo: .* turn credit be lost; take ratio 'turn'"),
        ("gamma", 0.0, r"gamma must be in \(0, 1\]; got 0.0"),
        ("gamma", math.nan, "gamma must be"),
        ("gamma", "1", "gamma must be a number; got '1'"),
        ("lam", 0.9, "lam must go with a method that has a critic; got mt-grpo; .* mt-ppo"),
        ("lam", 1.5, r"lam must be in \[0, 1\]; got 1.5"),
        ("whiten", True, "whiten must go with a method that has a critic; got mt-grpo"),
        ("whiten", "yes", "whiten must be true or false; got 'yes'"),
        ("critic", "ovn", "critic must be a known name; got 'ovn'; did you mean own"),
        ("aggregation", "turn-means", "did you mean turn-mean"),
        ("critic_warmup_steps", -1, "critic-warmup-steps must be >= 0"),
        ("value_clip", 0.0, "value-clip must be >= 1e-09"),
        ("estimator", "vineppo", "no more than training records; vineppo needs values"),
        ("estimator", "mt-pp", "did you mean mt-ppo"),
        ("steps", 0, "steps must be >= 1; got 0"),
        ("steps", 2.5, "steps must be a whole number; got 2.5"),
        ("steps", True, "steps must be a whole number; got True"),
        ("temperature", 0.0, "temperature must be"),
        ("temperature", "hot", "temperature must be a number; got 'hot'"),
        ("learning_rate", math.inf, "learning-rate must be"),
        ("group_size", -1, "group-size must be >= 1"),
        ("seed", -1, "seed must be"),
        ("minibatches", 17, r"minibatches must be <= tasks-per-step \(16\)"),
        ("reward_weights", {"exact_match": math.nan}, "exact_match is nan"),
        ("reward_weights", {"exact_match": "1"}, "exact_match is '1'"),
        ("reward_weights", "exact_match", "must be a table"),
        ("columns", "question=prompt", "columns must go with a file of questions; tasks are 'atlas'"),
        ("columns", "question:prompt", "columns must be pairs such as question=prompt,answers=gold"),
        ("columns", {"question": "prompt"}, "columns in file must be a text"),
        ("tracker", "wandbb", "tracker must be a known name; got 'wandbb'; did you mean wandb"),
        ("exact_match", "squadd", "did you mean squad"),
        ("branches", [4, 0], r"branches must be whole numbers >= 1, one per turn; got \(4, 0\)"),
        ("branches", 4, "branches must be whole numbers >= 1"),
        ("branches", [4, 2], "estimator that knows shared turns; mt-grpo would compare .* take one of mt-grpo-tree"),
        ("estimator", "mt-grpo-tree", "mt-grpo-tree must have rollouts that branch; .* --branches 4 2"),
        ("estimator", "vineppo", "vineppo needs values"),
        ("token_budget", 0, "token-budget must be >= 1; got 0"),
        ("token_budget", 1.5, "token-budget must be a whole number; got 1.5"),
        ("gamma", 0.9, "gamma must go with a method that takes it; got mt-grpo; .* grpo-mr"),
        ("critic", "shared", "critic must go with a method that has a critic; got mt-grpo"),
        ("critic_learning_rate", 0.1, "critic-learning-rate must go with a method that has a critic; got mt-grpo"),
        ("critic_warmup_steps", 3, "critic-warmup-steps must go with a method that has a critic"),
        ("value_clip", 0.2, "value-clip must go with a method that has a critic"),
        ("out", 5, "out in file must be a text; got 5; write it in quotes"),
        ("out", None, "out in file must be a text; got None"),
        ("tools", True, "tools in file must be a text; got True"),
        ("tasks", 5, "tasks in file must be a text; got 5"),
        ("corpus", ["a"], r"corpus in file must be a text; got \['a'\]"),
        ("policy", 7, "policy in file must be a text; got 7"),
        ("validation_tasks", 3, "validation-tasks in file must be a text; got 3"),
        ("estimator", 1, "estimator in file must be a text; got 1"),
        ("protocol", 1, "protocol in file must be a text; got 1"),
        ("judge_url", 1, "judge-url in file must be a text; got 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_name_and_value(option: str, value: object, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_dict({option: value}, "file")
    assert "\n" not in str(caught.value)


def test_a_tree_survives_json_and_fits_its_turns_and_ratio():
    config = TrainConfig(estimator="treerl", branches=(4, 2), token_budget=1000)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config))), "x") == config
    with pytest.raises(ConfigError, match=r"branches must name at most max-turns \(2\) turns; got 3"):
        TrainConfig(estimator="carl", branches=(4, 2, 2))
    with pytest.raises(ConfigError, match="ratio 'sequence' must go with rollouts that share no turns"):
        TrainConfig(estimator="tree-grpo", branches=(4, 2), ratio="sequence")
    with pytest.raises(ConfigError, match="vineppo needs values"):
        TrainConfig(estimator="vineppo", branches=(4, 2))


def test_an_unknown_option_names_its_file_and_the_nearest():
    with pytest.raises(ConfigError, match=r"an option in run\.toml .*'group_sise'; did you mean group_size"):
        config_from_dict({"group_sise": 4}, "run.toml")


def test_options_in_a_file_may_be_spelt_as_help_shows_them_but_once():
    assert config_from_dict({"tasks-per-step": 8, "max_turns": 3}, "x") == TrainConfig(tasks_per_step=8, max_turns=3)
    with pytest.raises(ConfigError, match="must come once; got tasks_per_step twice, as tasks-per-step too"):
        config_from_dict({"tasks_per_step": 8, "tasks-per-step": 9}, "x")


def test_option_files_are_toml_or_json_and_a_runs_own_counts(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 3\n[reward_weights]\nexact_match = 1.0\n")
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "config": {"steps": 4}}))
    assert read_config_file(tmp_path / "a.toml") == {"steps": 3, "reward_weights": {"exact_match": 1.0}}
    assert read_config_file(tmp_path / "config.json") == {"steps": 4}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "steps = ", "must be TOML or JSON"),
        ("a.json", "{", "must be TOML or JSON"),
        ("a.json", "[1]", "must hold a table of options; got list"),
        ("a.json", '{"config": 5}', r"config in .*a\.json must be a table of options; got 5"),
        ("a.toml", "config = 5", r"config in .*a\.toml must be a table of options; got 5"),
    ],
)
def test_a_file_without_options_is_refused(tmp_path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_config_file(tmp_path / name)


def test_a_missing_option_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="must exist"):
        read_config_file(tmp_path / "none.toml")


@pytest.mark.parametrize("estimator", CRITIC_METHODS)
def test_methods_with_a_critic_are_trained_and_take_its_options(estimator: str):
    config = TrainConfig(estimator=estimator, gamma=0.9, lam=0.8, whiten=False, critic="shared")
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config))), "x") == config


def test_a_sequence_ratio_goes_with_one_advantage_per_rollout():
    assert TrainConfig(ratio="sequence", estimator="grpo-mr").ratio == "sequence"
