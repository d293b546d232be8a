"""Turnwise: turn-level credit for multi-turn, tool-using language-model agents.

The names below are imported when they are first used, so that `import turnwise` and
`import turnwise.credit` cost no more than they need.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turnwise.engine import ScriptedEngine as ScriptedEngine
    from turnwise.env import ToolEnvironment as ToolEnvironment
    from turnwise.errors import ConfigError as ConfigError
    from turnwise.errors import InputError as InputError
    from turnwise.errors import RunError as RunError
    from turnwise.errors import ToolError as ToolError
    from turnwise.errors import TurnwiseError as TurnwiseError
    from turnwise.evaluation import evaluate as evaluate
    from turnwise.evaluation import rollouts as rollouts
    from turnwise.exporting import export as export
    from turnwise.policy import load_policy as load_policy
    from turnwise.report import load_run as load_run
    from turnwise.report import write_report as write_report
    from turnwise.rewards import score as score
    from turnwise.rollout import run_rollout as run_rollout
    from turnwise.rollout import run_tree as run_tree
    from turnwise.search import open_index as open_index
    from turnwise.search import search_tool as search_tool
    from turnwise.tasks import load_tasks as load_tasks
    from turnwise.tools import tool as tool
    from turnwise.training import train as train
    from turnwise.types import Rollout as Rollout
    from turnwise.types import Task as Task
    from turnwise.types import Turn as Turn

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "errors",
    "InputError": "errors",
    "Rollout": "types",
    "RunError": "errors",
    "ScriptedEngine": "engine",
    "Task": "types",
    "ToolEnvironment": "env",
    "ToolError": "errors",
    "Turn": "types",
    "TurnwiseError": "errors",
    "evaluate": "evaluation",
    "export": "exporting",
    "load_policy": "policy",
    "load_run": "report",
    "load_tasks": "tasks",
    "open_index": "search",
    "rollouts": "evaluation",
    "run_rollout": "rollout",
    "run_tree": "rollout",
    "score": "rewards",
    "search_tool": "search",
    "tool": "tools",
    "train": "training",
    "write_report": "report",
}
"""Every public name, and the module that holds it."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'turnwise' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"turnwise.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
