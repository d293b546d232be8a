"""Trackers: TensorBoard's event files read back; wandb and trackio by stand-ins that record what they are told."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from small_runs import small_world
from turnwise.config import TrainConfig
from turnwise.errors import ConfigError, RunError
from turnwise.rundir import checkpoint_folder
from turnwise.trackers import Tracker, check_tracker, tracking
from turnwise.training import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, Any]:
    """Options of a run of a few quick steps, without `out`."""
    folder = tmp_path_factory.mktemp("world")
    return {
        **small_world(folder, checkpoint, (f"q{i}" for i in range(4))),
        "steps": 2,
        "tasks_per_step": 1,
        "group_size": 2,
        "max_turn_tokens": 4,
        "minibatches": 1,
        "validate_every": 2,
        "validation_size": 1,
        "checkpoint_every": 1,
    }


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def expected(run: Path) -> dict[tuple[str, int], float]:
    """Every number of metrics.jsonl by the name that a tracker calls it, and its step."""
    return {
        (f"{record['split']}/{name}", record["step"]): value
        for record in records(run)
        for name, value in {**record["metrics"], "wall_s": record["wall_s"]}.items()
    }


class Crash:
    """A display that fails once a step is shown."""

    def __init__(self, step: int) -> None:
        self.step = step

    def show(self, record: dict) -> None:
        if record["step"] == self.step and record["split"] == "train":
            raise ZeroDivisionError


# ------------------------------------------------------------------------------ TensorBoard


def events(run: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    numbers = [(name, event) for name in found.Tags()["scalars"] for event in found.Scalars(name)]
    assert len({(name, event.step) for name, event in numbers}) == len(numbers), "a step was logged twice"
    return {(name, event.step): event.value for name, event in numbers}


def test_tensorboard_has_every_number_of_every_step_and_the_configuration(world: dict, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(**world, out=tmp_path / "run", tracker="tensorboard")
    found = events(tmp_path / "run")
    assert found == pytest.approx(expected(tmp_path / "run"))
    assert {step for name, step in found if name == "train/exact_match"} == {1, 2}
    assert {step for name, step in found if name == "validation/exact_match"} == {0, 2}
    texts = EventAccumulator(str(tmp_path / "run/tensorboard"))
    texts.Reload()
    text = texts.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text)["estimator"] == "mt-grpo"


def test_a_run_that_goes_on_replaces_the_steps_that_it_takes_again(world: dict, tmp_path: Path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    options = {**world, "checkpoint_every": 2, "steps": 4, "validate_every": 9}
    with pytest.raises(ZeroDivisionError):
        train(**options, out=out, tracker="tensorboard", display=Crash(3))
    assert max(step for _, step in events(out)) == 3
    shutil.rmtree(checkpoint_folder(out, 3))  # as after a power cut: step 3 was logged and is taken again
    train(out=out, resume=True)
    assert events(out) == pytest.approx(expected(out))
    assert {step for _, step in events(out)} == {0, 1, 2, 3, 4}


# ---------------------------------------------------------------------------- the stand-ins


class Service:
    """Stands in for wandb or trackio: records the calls."""

    def __init__(self, fail_at: int | None = None, key: bool = True) -> None:
        self.inits: list[dict] = []
        self.logged: list[dict] = []
        self.finished = 0
        self.fail_at = fail_at
        self.key = key
        self.id = "generated"
        self.Settings = dict

    def login(self, *, prompt: bool) -> bool:
        assert not prompt, "training must not wait for somebody to type"
        return self.key

    def init(self, **options: Any) -> "Service":
        self.inits.append(options)
        return self

    def define_metric(self, *_: str, **__: str) -> None: ...

    def log(self, numbers: dict, step: int | None = None) -> None:
        if self.fail_at is not None and len(self.logged) >= self.fail_at:
            raise ConnectionError("no\nroute")
        self.logged.append(numbers if step is None else {"step": step, **numbers})

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(autouse=True)
def no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def install(monkeypatch: pytest.MonkeyPatch, name: str, service: Service) -> Service:
    module = types.ModuleType(name)
    for attribute in ("login", "init", "Settings"):
        setattr(module, attribute, getattr(service, attribute))
    monkeypatch.setitem(sys.modules, name, module)
    return service


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_told_name_configuration_and_every_number_and_its_run_goes_on(
    name: str, world: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    service = install(monkeypatch, name, Service())
    out = tmp_path / "first"
    train(**world, out=out, tracker=name)
    assert service.finished == 1
    told = {(key, row["step"]): value for row in service.logged for key, value in row.items() if key != "step"}
    assert told == expected(out)
    train(out=out, steps=3, resume=True)
    begun, resumed = service.inits
    assert begun["project"] == "turnwise"
    assert begun["name"] == resumed["name"] == "first"
    assert begun["config"]["tasks_per_step"] == 1
    if name == "wandb":
        assert (begun["id"], resumed["id"]) == (None, "generated")
        assert begun["resume"] == resumed["resume"] == "allow"
    else:
        assert (begun["resume"], resumed["resume"]) == ("never", "allow")
    assert {row["step"] for row in service.logged} == {0, 1, 2, 3}
    assert service.finished == 2


def test_a_tracker_that_fails_is_said_once_and_never_stops_training(
    world: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    service = install(monkeypatch, "trackio", Service(fail_at=1))
    with pytest.warns(UserWarning, match=r"the tracker trackio failed \(ConnectionError: no route\)") as said:
        result = train(**world, out=tmp_path / "run", tracker="trackio")
    assert len(said) == 1
    assert result.finished
    assert len(service.logged) == 1
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2, 2]


# ------------------------------------------------------------------- errors before the start


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_an_error_before_the_start(
    name: str, world: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ConfigError, match=rf'tracker {name} must be installed; .* pip install "turnwise\[{name}\]"'):
        train(**world, out=tmp_path / "run", tracker=name)
    assert not (tmp_path / "run").exists()


def test_nobody_logged_in_is_an_error_before_the_start_unless_offline(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, "wandb", Service(key=False))
    with pytest.raises(ConfigError, match="tracker wandb must be logged in"):
        check_tracker("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker("wandb")


def test_a_tracker_that_cannot_start_is_an_error_and_the_folder_can_be_used_again(
    world: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    service = install(monkeypatch, "wandb", Service())

    def refuse(**_: Any) -> None:
        raise TimeoutError("no answer in 90 s")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ConfigError, match="tracker wandb must start; got TimeoutError: no answer in 90 s"):
        train(**world, out=tmp_path / "run", tracker="wandb")
    train(**world, out=tmp_path / "run")
    assert not service.logged


def test_an_unknown_tracker_has_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean tensorboard"):
        TrainConfig(tracker="tensorbord")  # pyright: ignore[reportArgumentType]


def test_without_a_tracker_there_is_none(tmp_path: Path):
    with tracking(TrainConfig(out=tmp_path)) as tracker:
        assert tracker is None


def test_a_close_that_fails_is_a_warning_too():
    def fail() -> None:
        raise RunError("disk")

    tracker = Tracker("x", lambda step, numbers: None, fail)
    with pytest.warns(UserWarning, match="the tracker x failed"):
        tracker.close()


@pytest.mark.slow
def test_the_real_wandb_writes_an_offline_run(world: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(**world, out=tmp_path / "run", tracker="wandb")
    train(out=tmp_path / "run", steps=3, resume=True)
    names = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")]
    assert len(names) == 2
    assert len(set(names)) == 1, "both parts are of one run"


@pytest.mark.slow
def test_the_real_trackio_keeps_one_run(world: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    train(**world, out=tmp_path / "run", tracker="trackio")
    train(out=tmp_path / "run", steps=3, resume=True)
    assert SQLiteStorage.get_runs("turnwise") == ["run"]
    logs = SQLiteStorage.get_logs("turnwise", "run")
    assert {log["step"] for log in logs} == {0, 1, 2, 3}
