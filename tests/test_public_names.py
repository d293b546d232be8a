"""What `turnwise` offers by name."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import turnwise

PUBLIC = [
    "ConfigError",
    "InputError",
    "Rollout",
    "RunError",
    "ScriptedEngine",
    "Task",
    "ToolEnvironment",
    "ToolError",
    "Turn",
    "TurnwiseError",
    "evaluate",
    "export",
    "load_policy",
    "load_run",
    "load_tasks",
    "open_index",
    "rollouts",
    "run_rollout",
    "run_tree",
    "score",
    "search_tool",
    "tool",
    "train",
    "write_report",
]


def test_the_public_names_are_these():
    assert sorted(turnwise._HOME) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_its_modules_own_and_documented(name: str):
    value = getattr(turnwise, name)
    assert value is getattr(importlib.import_module(f"turnwise.{turnwise._HOME[name]}"), name)
    assert inspect.getdoc(value)


def test_no_module_hides_a_public_name():
    folder = Path(turnwise.__file__).parent
    modules = {path.stem if path.is_file() else path.name for path in folder.iterdir()}
    assert not modules & set(PUBLIC)


def test_train_is_the_function_however_it_is_imported():
    import turnwise.training
    from turnwise import train

    assert train is turnwise.train is turnwise.training.train


def test_type_checkers_see_the_same_names_as_the_interpreter():
    tree = ast.parse(Path(turnwise.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: str(node.module).removeprefix("turnwise.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == turnwise._HOME


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = turnwise.trian
