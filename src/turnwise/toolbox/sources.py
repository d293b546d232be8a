"""The tools that a configuration names: files, built-in ones, MCP servers."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turnwise.errors import ConfigError, InputError, unknown_name
from turnwise.records import parsed
from turnwise.tool_files import load_tools
from turnwise.tools import Tool, tool_mapping

BUILT_IN = ("search", "calculator", "python", "python:allow_unisolated")
"""The sources that are names."""
FORMS = "a name, a Python file, mcp:COMMAND, the URL of an MCP server, or a JSON or TOML file of MCP servers"


def source_names(sources: str | Path | None) -> list[str]:
    """The sources that commas part; the search tool alone where none is named."""
    return [name.strip() for name in str("search" if sources is None else sources).split(",")]


def named_tools(sources: str | Path | None, search: Callable[[], Tool]) -> dict[str, Tool]:
    """The tools of sources that commas part; `search` makes the built-in search tool where it is one of them.

    A source is one of `BUILT_IN`, a Python file (see `load_tools`), `mcp:COMMAND` with the command that starts an MCP
    server, the URL of one, or a JSON or TOML file with `mcpServers`. Raises ConfigError or InputError for a source that
    cannot be used, and for two tools of one name.
    """
    names = source_names(sources)
    if not all(names):
        raise ConfigError(f"tools must be {FORMS}, parted by commas; got {str(sources)!r}; leave out the empty one")
    return tool_mapping(entry for name in names for entry in _of_source(name, search))


def _of_source(name: str, search: Callable[[], Tool]) -> list[Tool]:
    built_in: dict[str, Callable[[], Tool]] = {
        "search": search,
        "calculator": _calculator,
        "python": _python,
        "python:allow_unisolated": lambda: _python(allow_unisolated=True),
    }
    if name in built_in:
        return [built_in[name]()]
    if name.endswith(".py") and not name.startswith("mcp:"):
        return list(load_tools(name).values())
    if name.startswith("mcp:") or re.match(r"https?://", name):
        from turnwise.toolbox.mcp import mcp_tools, server_of_command

        return mcp_tools(server_of_command(name.removeprefix("mcp:")))
    if Path(name).suffix in (".json", ".toml"):
        from turnwise.toolbox.mcp import mcp_tools, servers_of_config

        return [entry for server in servers_of_config(_table(Path(name)), name) for entry in mcp_tools(server)]
    if re.fullmatch(r"[\w:]+", name):
        raise unknown_name("a source of tools", name, BUILT_IN)
    return list(load_tools(name).values())


def _calculator() -> Tool:
    from turnwise.toolbox.calculator import calculator_tool

    return calculator_tool()


def _python(*, allow_unisolated: bool = False) -> Tool:
    from turnwise.toolbox.python import python_tool

    return python_tool(allow_unisolated=allow_unisolated)


def _table(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return parsed(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"{path} must be a file of MCP servers; there is no such file; check the path") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON or TOML; it cannot be read ({error}); correct it") from error
