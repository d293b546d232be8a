"""The tables of README.md and docs/ that show results, written anew from the committed files in results/.

    python experiments/tables.py [--check]

A table stands between `<!-- table NAME ... -->` and `<!-- end -->`; NAME and what follows are a function here and its
arguments. `--check` writes nothing and leaves with 1 where a table is not what the results say.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/evidence.md", "docs/trivia.md", "docs/environments.md")
TABLE = re.compile(r"(?<=<!-- table )(?P<call>[^>]+?) -->\n(?P<body>.*?)(?=<!-- end -->)", re.DOTALL)
STEPS = (1, 3, 5, 7, 9, 11, 16, 21, 31)
"""First steps of the columns of a curve, counted from 1; the last column ends at step 60."""
NAMES = {
    **{name: name.upper() for name in ("grpo-or", "grpo-mr", "mt-grpo", "mt-ppo")},
    "ppo-or": "PPO-OR (exact match alone)",
    "ppo-mr": "PPO-MR (merged, its own content)",
    "mt-ppo-paid-at-end": "MT-PPO's content, paid at the end",
    "gigpo": "GiGPO",
    "turn-rloo": "turn-rloo",
}


def result(name: str) -> Any:
    """A committed result."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def mean(values: Iterable[float]) -> float:
    """As the results' own tables take it, so that both round alike."""
    known = list(values)
    return sum(known) / len(known)


def number(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """A share without its leading zero, as the tables write it."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text).replace("-", "−")


def over_seeds(values: Sequence[float], digits: int = 3) -> str:
    """The mean, lowest and highest seed in brackets."""
    return f"{number(mean(values), digits)} ({number(min(values), digits)}-{number(max(values), digits)})"


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def by_arm(found: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {arm: [run for run in found["runs"] if run["arm"] == arm] for arm in found["arms"]}


def metric(run: Mapping[str, Any], where: str, name: str) -> float:
    return run["evaluations"][where][name]["mean"]


# ------------------------------------------------------------------------------------------- the tables


def finals(name: str) -> str:
    """Methods at the end of a reproduction of the paper's contrast."""
    found = result(name)
    columns = [("held-out-greedy", m) for m in ("tool_execution", "answer_in_results", "exact_match")]
    columns.append(("seen-greedy", "exact_match"))
    rows = [["start", *(number(metric(found["start"], *column)) for column in columns)]]
    for arm, runs in by_arm(found).items():
        rows.append([NAMES[arm], *(over_seeds([metric(run, *column) for run in runs]) for column in columns)])
    return lines(("method", "held-out: tool execution", "answer in results", "exact match", "seen: exact match"), rows)


def curves(name: str) -> str:
    """The way there: means over steps and seeds."""
    ends = [*(step - 1 for step in STEPS[1:]), 60]
    rows = []
    for of, said in (("tool_execution", "tool execution"), ("exact_match", "exact match")):
        for i, (arm, runs) in enumerate(by_arm(result(name)).items()):
            means = [mean(mean(run["curve"][of][a - 1 : b]) for run in runs) for a, b in zip(STEPS, ends, strict=True)]
            rows.append([f"{said}, {NAMES[arm]}" if i == 0 else NAMES[arm], *(number(x, 2) for x in means)])
    return lines(("steps", *(f"{a}-{b}" for a, b in zip(STEPS, ends, strict=True))), rows)


def searches(name: str) -> str:
    """Methods on two-hop questions, the best first."""
    found = result(name)
    columns = ("well_called", "gold_found", "exact_match")
    rows = [["start", *(number(metric(found["start"], "held-out-greedy", m)) for m in columns), ""]]
    for arm, runs in sorted(by_arm(found).items(), key=lambda of: -mean(_ends(of[1]))):
        means = [number(mean(values)) for m in columns[:2] if (values := _values(runs, m))]
        rows.append([NAMES[arm], *means, over_seeds(_ends(runs)), still_searching(runs)])
    return lines(
        ("method", "searches called well", "gold articles found", "exact match (seeds)", "still searching"), rows
    )


def still_searching(runs: Sequence[Mapping[str, Any]]) -> str:
    """Runs whose agents search in at least half of the held-out questions."""
    return f"{sum(x >= 0.5 for x in _values(runs, 'tool_execution'))} of {len(runs)}"


def _values(runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A metric of those runs that have it; an agent that does not search has no calls to get right."""
    return [metric(run, "held-out-greedy", name) for run in runs if name in run["evaluations"]["held-out-greedy"]]


def _ends(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return _values(runs, "exact_match")


def turn_one(name: str) -> str:
    """Tool execution and answers in results, greedy and sampled: the start, the methods, and the bare question."""
    found = result(name)
    columns = [(how, m) for m in ("tool_execution", "answer_in_results") for how in ("greedy", "sampled")]
    rows = [["after demonstrations", *(number(metric(found["start"], f"held-out-{how}", m)) for how, m in columns)]]
    for arm, runs in by_arm(found).items():
        values = [over_seeds([metric(run, f"held-out-{how}", m) for run in runs]) for how, m in columns]
        rows.append([f"after {NAMES[arm]}, {len(runs)} seeds", *values])
    raw = number(found["start"]["raw_question_answer_in_results"]["held-out"])
    rows.append(["the question itself as query", "", "", raw, raw])
    return lines(("", "tool execution, greedy", "sampled", "answer in results, greedy", "sampled"), rows)


def design(name: str) -> str:
    """Arms of a design on two-hop questions: how they end, and each minus its baseline, seed by seed."""
    found = result(name)
    rows = []
    for arm, runs in by_arm(found).items():
        compared = beside(found["comparison"][arm])
        rows.append([f"`{arm}`", still_searching(runs), over_seeds(_ends(runs), 2), *compared])
    head = (
        "arm",
        "still searching",
        "exact match",
        "minus",
        "exact match [95 %]",
        "better : worse, p",
        "over training",
    )
    return lines(head, rows)


def contrast(name: str) -> str:
    """Arms of a design on single questions: how they end, when they have the tool, and each minus its baseline."""
    found = result(name)
    rows = []
    for arm, runs in by_arm(found).items():
        ends = [over_seeds(_values(runs, m), 2) for m in ("tool_execution", "exact_match")]
        median = found["comparison"][arm]["reached"]["tool_execution"]["steps"]["median"]
        steps = f"{median['at']:.0f}" if median["reached"] else f"> {median['at']:.0f}"
        rows.append([f"`{arm}`", *ends, steps, *beside(found["comparison"][arm])])
    head = ("arm", "tool execution", "exact match", "steps to .9 tool execution")
    return lines((*head, "minus", "exact match [95 %]", "better : worse, p", "over training"), rows)


def beside(compared: Mapping[str, Any]) -> list[str]:
    """The baseline, the difference in exact match on held-out questions, its signs, and that over all of training."""
    if "differences" not in compared:
        return ["", "", "", ""]
    of, area = (compared["differences"][key] for key in ("held-out-greedy/exact_match", "area/exact_match"))
    signs = f"{of['wins']} : {of['losses']}, {number(of['p'])}"
    return [f"`{compared['baseline']}`", with_interval(of), signs, with_interval(area)]


def with_interval(of: Mapping[str, Any]) -> str:
    low, high = (number(of["interval"][side], sign=True) for side in ("low", "high"))
    return f"{number(of['mean'], sign=True)} [{low}, {high}]"


def anchors() -> str:
    """Methods on games of TextWorld."""
    rows = []
    for name, of in result("anchors")["methods"].items():
        shown = [f"`{name}`", f"{of['rate']:g}", number(mean(of["won"]))]
        compared = of["beside"]
        signs = "" if compared is None else f"{compared['wins']} : {compared['losses']}, {number(compared['p'])}"
        rows.append([*shown, "" if compared is None else with_interval(compared), signs])
    return lines(("method", "learning rate", "won", "minus `grpo-mr` [95 %]", "better : worse, p"), rows)


TABLES: Mapping[str, Callable[..., str]] = {
    "finals": finals,
    "curves": curves,
    "searches": searches,
    "turn-one": turn_one,
    "design": design,
    "contrast": contrast,
    "anchors": anchors,
}


def rendered(text: str) -> str:
    """A page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        name, *arguments = match["call"].split()
        return f"{match['call']} -->\n\n{TABLES[name](*arguments)}\n"

    return TABLE.sub(made, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if rendered(text) != text:
            stale.append(page)
            if not check:
                path.write_text(rendered(text), encoding="utf-8")
    print(", ".join(stale) or "nothing", "not as the results say" if check else "written anew")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
