"""Options of different parts together: a run that is evaluated, served or resumed otherwise than it was trained."""

from pathlib import Path

import pytest

from chats import CODER, template_chat
from turnwise.config import TrainConfig, on_engine
from turnwise.errors import ConfigError
from turnwise.evaluation import elsewhere
from turnwise.policy import load_policy, save_policy, tiny_policy
from turnwise.rundir import create_run
from turnwise.training import resumed_config

BRANCHING = TrainConfig(branches=(2, 2), estimator="tree-grpo", group_size=1, dynamic_sampling=2, max_turns=2)


def test_a_run_with_vllm_is_played_by_the_other_engine():
    config = TrainConfig(engine="vllm", vllm_memory_share=0.3)
    assert on_engine(config, "hf") == TrainConfig()
    assert on_engine(config, "vllm") == config


@pytest.mark.parametrize(("environment", "max_turns"), [(None, 1), (None, 5), ("gym:FrozenLake-v1", None)])
def test_a_run_with_branches_is_played_for_other_turns_and_elsewhere(environment: str | None, max_turns: int | None):
    found = elsewhere(BRANCHING, environment, max_turns)
    assert (found.branches, found.max_turns, found.environment) == ((), max_turns or 2, environment)


def test_a_run_in_a_models_own_format_goes_on_under_either_name(tmp_path: Path):
    start, out = tmp_path / "start", tmp_path / "run"
    save_policy(tiny_policy(template_chat(CODER), seed=0, hidden=16, layers=1), start)
    create_run(out, TrainConfig(policy=str(start), protocol="qwen3-coder", out=out))
    for name in ("native", "qwen3-coder"):
        assert resumed_config(TrainConfig(out=out, protocol=name)).protocol == "qwen3-coder"
    with pytest.raises(ConfigError, match="protocol is 'qwen3-coder' there; got 'hermes'"):
        resumed_config(TrainConfig(out=out, protocol="hermes"))


def test_a_run_is_no_policy_and_says_what_is(tmp_path: Path):
    create_run(tmp_path / "run", TrainConfig(out=tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"a policy must be a checkpoint; .*run is a run; take .*run/best"):
        load_policy(tmp_path / "run")
