"""Nothing that is read from a file becomes code: what could do that is not called, but where it is said here."""

import ast
from pathlib import Path

import pytest

import turnwise

PACKAGE = Path(turnwise.__file__).parent
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml", "jsonpickle"}
"""Modules whose readers run what they read."""
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
ALLOWED = {("tool_files.py", "exec"), ("tool_files.py", "compile")}
"""The Python file of tools, rewards or an environment, which a user names to be run."""


def faults(source: str, name: str = "x.py") -> list[str]:
    """What in a module could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            found += _call_faults(node, name)
    return found


def _call_faults(node: ast.Call, name: str) -> list[str]:
    called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    found = [called] if called in CALLS and (name, called) not in ALLOWED else []
    found += [
        f"{called}({o}=...)"
        for o in ("trust_remote_code", "allow_pickle", "shell")
        if options.get(o, "False") != "False"
    ]
    if called == "torch.load" and options.get("weights_only") != "True":
        found.append(called)
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_module_runs_what_it_reads(file: Path):
    assert faults(file.read_text(encoding="utf-8"), str(file.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "eval(text)",
        "exec(compile(text, 'a', 'exec'))",
        "import os; os.system('id')",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "numpy.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=given)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_runs_code_is_found(source: str):
    assert faults(source)


def test_what_does_not_run_code_is_let_be():
    assert faults("torch.load(file, weights_only=True); json.loads(text); re.compile(text); model.eval()") == []
