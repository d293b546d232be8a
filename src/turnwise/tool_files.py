"""Tools and other functions out of a user's Python file."""

import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

from turnwise.errors import ConfigError, InputError
from turnwise.tool_objects import stateful
from turnwise.tools import Tool, tool_mapping, tool_of


def load_tools(path: str | Path) -> dict[str, Tool]:
    """The tools of a Python file: its list `TOOLS`, or else every public function it defines.

    `TOOLS` may hold functions, decorated ones included, and classes whose methods are tools of an object
    per rollout (see `stateful`). The file is executed. Raises InputError where it cannot be, ConfigError
    where it has no tools or one that lacks annotations or a docstring.
    """
    module = load_module(path)
    listed = getattr(module, "TOOLS", None)
    if listed is not None and not isinstance(listed, list | tuple):
        raise ConfigError(f"TOOLS in {path} must be a list; got {type(listed).__name__}; list the tool functions")
    found = public_functions(module, Tool) if listed is None else listed
    tools = tool_mapping(entry for given in found for entry in _entries(given))
    if not tools:
        raise ConfigError(
            f"{path} must define at least one tool; got none; write a public function with type "
            "annotations and a docstring, or list a class in TOOLS"
        )
    return tools


def _entries(given: Any) -> list[Tool]:
    """The tools that an entry of TOOLS stands for."""
    if isinstance(given, Tool):
        return [given]
    if isinstance(given, list | tuple):
        return [entry for one in given for entry in _entries(one)]
    return stateful(given) if isinstance(given, type) else [tool_of(given)]


def public_functions(module: types.ModuleType, decorated: type | tuple[type, ...] = ()) -> list[Any]:
    """The functions that a module itself defines under public names, plain or as a class `decorated`, in order."""

    def is_own(value: Any) -> bool:
        function = value.function if isinstance(value, decorated) else value
        return inspect.isfunction(function) and function.__module__ == module.__name__

    return [value for name, value in vars(module).items() if not name.startswith("_") and is_own(value)]


def load_module(path: str | Path) -> types.ModuleType:
    """A user's Python file, executed as a module; its folder joins the end of the import path.

    Raises InputError, in one line, where the file is missing, is not Python, or fails.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"{path} must be a Python file; there is no such file; check the path")
    name = f"turnwise_user_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}"
    loader = importlib.util.spec_from_loader(name, loader=None, origin=str(file))
    assert loader is not None
    module = importlib.util.module_from_spec(loader)
    module.__file__ = str(file)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except SyntaxError as error:
        raise InputError(f"{path} must be valid Python; line {error.lineno}: {error.msg}; correct the file") from error
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"{path} must run without error; got {type(error).__name__}: {text}; correct the file"
        ) from error
    return module
