"""Data flows one way: a module imports only from those before it, and light ones stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import turnwise

PACKAGE = Path(turnwise.__file__).parent

LAYERS = [
    "errors",
    "types",
    "metrics",
    "paired",
    "records",
    "question_sets",
    "tasks",
    "convert",
    "background",
    "web",
    "tools",
    "tool_objects",
    "tool_files",
    "toolbox",
    "search",
    "atlas",
    "tags",
    "search_tags",
    "formats",
    "rendering",
    "templates",
    "protocols",
    "env",
    "envs",
    "chat",
    "conversations",
    "fuzz",
    "engine",
    "devices",
    "cores",
    "quick",
    "lora",
    "engines",
    "rollout",
    "truth",
    "endpoint",
    "dialogue",
    "rewards",
    "judge",
    "credit",
    "lab",
    "traces",
    "batch",
    "loss",
    "logits",
    "sources",
    "checksums",
    "policy",
    "llama2c",
    "critic",
    "config",
    "compute",
    "trust",
    "rundir",
    "setting",
    "evaluation",
    "crediting",
    "controls",
    "correction",
    "learning",
    "memory",
    "ahead",
    "watch",
    "trackers",
    "training",
    "exporting",
    "auditing",
    "warmup",
    "search_warmup",
    "demonstrations",
    "compare",
    "designs",
    "report",
    "inspection",
    "display",
    "hostile_files",
    "hostile",
    "serving",
    "adapters",
    "commands",
    "cli",
]
"""Every module and folder, in the order of the flow."""

EXCEPTIONS = {("search", "atlas")}
"""The corpus called `atlas` is asked for inside a function; the atlas has the search's records."""


def layer(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(file: Path) -> Iterator[str]:
    """The layers that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} must import by full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "turnwise" and len(parts) > 1 and parts[1] in LAYERS:
                yield parts[1]


FILES = [f for f in sorted(PACKAGE.rglob("*.py")) if f != PACKAGE / "__init__.py"]


def test_the_order_names_every_module():
    assert {layer(file) for file in FILES} == set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_upstream(file: Path):
    here = layer(file)
    allowed = set(LAYERS[: LAYERS.index(here) + 1]) | {to for own, to in EXCEPTIONS if own == here}
    later = set(imported_layers(file)) - allowed
    assert not later, f"{file.name} imports {sorted(later)}, which come after it in the data flow"


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running some code."""
    ask = "import sys; print(*{m.partition('.')[0] for m in sys.modules}, file=sys.stderr)"
    command = [sys.executable, "-c", f"{code}\n{ask}"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stderr.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import turnwise", {"torch", "transformers", "numpy", "tyro"}),
        ("import turnwise.credit, turnwise.lab", {"torch", "transformers", "tyro", "rich"}),
        ("import turnwise.env, turnwise.rewards, turnwise.config", {"torch", "transformers"}),
        ("import turnwise.report, turnwise.display", {"torch", "transformers"}),
        ("import turnwise.adapters.doctor, turnwise.adapters.skyrl", {"torch", "transformers", "trl", "verl", "ray"}),
        ("from turnwise.cli import main; main(['--help'])", {"torch", "numpy", "tyro", "rich"}),
        ("from turnwise.cli import main; main(['search', 'Kenya'])", {"torch", "transformers"}),
    ],
)
def test_light_parts_load_nothing_heavy(code: str, absent: set[str]):
    assert not modules_after(code) & absent
