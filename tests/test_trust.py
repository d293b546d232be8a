"""Code that a run names is executed for the user who made the run, and for nobody else unasked."""

import json
import shutil
from pathlib import Path

import pytest

from turnwise.config import TrainConfig
from turnwise.errors import RunError
from turnwise.evaluation import run_config
from turnwise.rundir import read_config, write_config
from turnwise.training import resumed_config
from turnwise.trust import named_code


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "mine"))
    monkeypatch.delenv("TURNWISE_TRUST", raising=False)
    return tmp_path


def make_run(folder: Path, **options) -> Path:
    folder.mkdir()
    write_config(folder, TrainConfig(out=folder, **options))
    return folder


def test_own_runs_are_played_wherever_they_lie(home):
    run = make_run(home / "run", tools="tools.py")
    assert run_config(run).tools == "tools.py"
    moved = shutil.move(run, home / "moved")
    assert run_config(moved).tools == "tools.py"


@pytest.mark.parametrize(
    "options",
    [
        {"tools": "search,tools.py"},
        {"tools": "mcp:sh -c evil"},
        {"rewards": Path("rewards.py"), "reward_weights": {}},
        {"environment": "game.py"},
    ],
)
def test_a_strangers_code_is_not_executed_unasked(home, monkeypatch, options):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "theirs"))
    run = make_run(home / "run", **options)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "mine"))
    (name,) = set(options) - {"reward_weights"}
    for play in (run_config, lambda path: resumed_config(TrainConfig(out=path))):
        with pytest.raises(RunError, match=f"must be a run that you made here.* it has {name} = .*TURNWISE_TRUST=1"):
            play(run)
    assert read_config(run) is not None, "whoever only reads a run executes nothing"
    monkeypatch.setenv("TURNWISE_TRUST", "1")
    assert run_config(run) == read_config(run)


@pytest.mark.parametrize("seal", [None, "", "é", 0, "0" * 64, "left out"])
def test_an_edited_run_is_a_strangers(home, seal):
    run = make_run(home / "run", tools="tools.py")
    record = json.loads((run / "config.json").read_text())
    record["config"]["tools"] = "other.py"
    record |= {} if seal == "left out" else {"seal": seal}
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"tools = other\.py"):
        run_config(run)


def test_runs_without_code_need_no_seal(home, monkeypatch):
    run = make_run(home / "run", tools="search,calculator,python")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "another"))
    assert run_config(run).tools == "search,calculator,python"
    assert named_code(TrainConfig()) == []


def test_without_a_folder_for_the_key_a_run_is_made_all_the_same(home, monkeypatch):
    (home / "mine").write_text("a file where a folder should be")
    run = make_run(home / "run", tools="tools.py")
    with pytest.raises(RunError, match="TURNWISE_TRUST=1"):
        run_config(run)


def test_an_empty_key_seals_nothing(home):
    (home / "mine" / "turnwise").mkdir(parents=True)
    (home / "mine" / "turnwise" / "key").touch()
    with pytest.raises(RunError, match="TURNWISE_TRUST=1"):
        run_config(make_run(home / "run", tools="tools.py"))
