"""Trackers: where the metrics of a run go beside metrics.jsonl, to be watched as it trains.

A tracker is shown every record that is written, like a display. What keeps one from starting is an error before the
first step; what fails later is said once, and training goes on without it. Each library is an extra of its own.
"""

import contextlib
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from turnwise.config import TrainConfig, config_to_dict
from turnwise.errors import ConfigError
from turnwise.records import parsed
from turnwise.rundir import TRACKER_FILE, write_atomically

PROJECT = "turnwise"
"""What the runs are filed under, unless WANDB_PROJECT names another project for wandb."""
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""What each tracker imports."""

Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step's numbers by name."""


class Tracker:
    """A started tracker, as a display."""

    def __init__(self, name: str, log: Log, close: Callable[[], None]) -> None:
        self.name = name
        self._log = log
        self._close = close
        self.failed = False

    def show(self, record: Mapping[str, Any]) -> None:
        """Passes on a line of metrics.jsonl; the numbers are called SPLIT/METRIC."""
        numbers = {**record["metrics"], "wall_s": record["wall_s"]}
        self._try(lambda: self._log(record["step"], {f"{record['split']}/{k}": v for k, v in numbers.items()}))

    def say(self, text: str) -> None:
        """Nothing: trackers take numbers."""

    def close(self) -> None:
        """Has everything written."""
        self._try(self._close)

    def _try(self, act: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # training matters more than whatever another library or its network meets
            self.failed = True
            warnings.warn(
                f"the tracker {self.name} failed ({_text(error)}); training goes on without it, and metrics.jsonl has "
                "every number",
                stacklevel=2,
            )


def check_tracker(name: str | None) -> None:
    """Raises ConfigError where a tracker is not installed or nobody is logged in; None is no tracker."""
    if name is None:
        return
    try:
        module: Any = importlib.import_module(MODULES[name])
    except ImportError as error:  # torch says ImportError where tensorboard is missing
        raise ConfigError(
            f'tracker {name} must be installed; got {_text(error)}; pip install "turnwise[{name}]", or leave it out'
        ) from error
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if name == "wandb" and not offline and not module.login(prompt=False):
        raise ConfigError(
            "tracker wandb must be logged in; there is no key; run `wandb login`, or set WANDB_MODE=offline"
        )


@contextlib.contextmanager
def tracking(config: TrainConfig, *, after: int | None = None) -> Iterator[Tracker | None]:
    """The configured tracker, closed at the end; None without one.

    `after` is the step after which a run goes on: the tracker's run goes on too. Raises ConfigError where the tracker
    cannot start.
    """
    if config.tracker is None:
        yield None
        return
    try:
        log, close = _OPENERS[config.tracker](config, after)
    except Exception as error:
        raise ConfigError(
            f"tracker {config.tracker} must start; got {_text(error)}; check its set-up and network, or leave it out"
        ) from error
    tracker = Tracker(config.tracker, log, close)
    try:
        yield tracker
    finally:
        tracker.close()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# -------------------------------------------------------------------------------- each one


def _tensorboard(config: TrainConfig, after: int | None) -> tuple[Log, Callable[[], None]]:
    """Event files in the run directory; steps that a continued run takes again replace those of before."""
    from torch.utils.tensorboard import SummaryWriter

    purge = None if after is None else after + 1 if after else 0
    writer = SummaryWriter(str(config.out / "tensorboard"), purge_step=purge)
    if after is None:
        writer.add_text("config", f"    {json.dumps(config_to_dict(config), indent=1)}".replace("\n", "\n    "), 0)

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _wandb(config: TrainConfig, after: int | None) -> tuple[Log, Callable[[], None]]:
    """A run of Weights & Biases, under the run directory's name; its id is kept there for when it goes on."""
    import wandb  # pyright: ignore[reportMissingImports]

    path = config.out / TRACKER_FILE
    run: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=config.out.name,
        id=_saved_id(path) if after is not None else None,
        resume="allow",
        config=config_to_dict(config),
        dir=str(config.out),
        settings=wandb.Settings(console="off", silent=True),
    )
    write_atomically(path, json.dumps({"tracker": "wandb", "id": run.id}) + "\n")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return lambda step, numbers: run.log({"step": step, **numbers}), run.finish


def _saved_id(path: Path) -> str | None:
    try:
        return parsed(path.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _trackio(config: TrainConfig, after: int | None) -> tuple[Log, Callable[[], None]]:
    """A run of trackio, on this machine unless its environment variables name another place."""
    import trackio  # pyright: ignore[reportMissingImports]

    run: Any = trackio.init(
        project=PROJECT,
        name=config.out.name,
        config=config_to_dict(config),
        resume="never" if after is None else "allow",
        embed=False,
    )
    return lambda step, numbers: run.log(dict(numbers), step=step), run.finish


_OPENERS: Mapping[str, Callable[[TrainConfig, int | None], tuple[Log, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
