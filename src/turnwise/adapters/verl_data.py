"""A setting's questions as the Parquet files that verl trains on, for the agent loop `turnwise/environment`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turnwise.adapters.dense import PREFIX
from turnwise.config import TrainConfig
from turnwise.setting import make_setting
from turnwise.types import Task


def task_row(task: Task, index: int) -> dict[str, Any]:
    """A question as a row of verl's, which names its task: what the policy sees first, the environment says."""
    return {
        "prompt": [{"role": "user", "content": task.question}],
        "data_source": "turnwise",
        "agent_name": f"{PREFIX}environment",
        "reward_model": {"style": "rule", "ground_truth": list(task.answers)},
        "extra_info": {"index": index, "task": task.id},
    }


def write_dataset(config: TrainConfig, folder: Path, *, tasks: int | None = None) -> tuple[Path, Path]:
    """Writes `train.parquet` and `validation.parquet`; `tasks` takes the first so many questions of each."""
    from pandas import DataFrame

    setting = make_setting(config)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Sequence[Task]] = {"train": setting.train, "validation": setting.validation}
    paths = {name: folder / f"{name}.parquet" for name in parts}
    for name, part in parts.items():
        rows = [task_row(task, i) for i, task in enumerate(part[:tasks])]
        DataFrame(rows).to_parquet(paths[name])
    return paths["train"], paths["validation"]
