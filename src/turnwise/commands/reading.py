"""Commands that read what is there: reports, credit, audits, the laboratory, the doctor."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from turnwise.commands.terminal import check_place, open_console
from turnwise.errors import ConfigError, InputError, RunError, unknown_name

SHOWN_METHODS = ("grpo-or", "grpo-mr", "mt-grpo", "turn-rloo")
"""What `turnwise credit` prints unless told otherwise: as many as fit a line."""
LARGEST_GROUP = 128
"""Rollouts in a group that `turnwise lab` takes on."""


def report(runs: tuple[Path, ...], /, *, out: Path | None = None) -> None:
    """Print the paper's table of some runs, and write a page with curves and the credit of turns.

    Args:
        runs: Run directories.
        out: Page to write; by default report.html, in the run directory where there is one run.
    """
    from turnwise.report import load_run, paper_table, print_table, table_notes, write_report
    from turnwise.report.data import MAX_ROLLOUTS

    if not runs:
        raise InputError("a report must be of at least one run; got none; name run directories")
    most = 2 * MAX_ROLLOUTS // len(runs)  # twice a run's share, as others may not need theirs
    loaded = [load_run(run, rollouts=most) for run in runs]
    print_table(paper_table(loaded), open_console())
    for note in table_notes(loaded):
        print(note)
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    print(f"The page is {write_report(loaded, out or default)}.")


def credit(
    file: Path,
    /,
    *,
    methods: tuple[str, ...] = (),
    groups: int = 3,
    out: Path | None = None,
    write: Path | None = None,
) -> None:
    """Compute the credit of recorded rollouts by several methods, side by side.

    Args:
        file: A run's rollouts.jsonl, traces of verifiers, or JSON lines of turns and rewards (see docs/credit.md).
        methods: Names of estimators; by default some of the best known here, and on the page all that the file has the
            fields for. Of those with an advantage per token the mean over each turn's tokens is shown.
        groups: Groups to print.
        out: Also write an HTML page there.
        write: Also write traces of verifiers there, with the one method's advantages in their nodes.
    """
    from turnwise.credit import ESTIMATORS, TOKEN_ESTIMATORS
    from turnwise.report.side import print_side_by_side, write_side_by_side
    from turnwise.traces import lacking, read_traces, recorded_credit

    known = (*ESTIMATORS, *TOKEN_ESTIMATORS)
    for name in methods:
        if name not in known:
            raise unknown_name("methods", name, known)
    _check_least("groups", groups, 1)
    if write and len(methods) != 1:
        raise ConfigError(f"methods must be one where its credit is written; got {len(methods)}; name one")
    for path in filter(None, (out, write)):
        _check_out(path)
    traces = read_traces(file)
    for name in methods:
        if missing := " and ".join(lacking(name, traces)):
            raise InputError(
                f"{file} must have {missing} in every turn for {name}; it has not; add it, or leave it out"
            )
    found = _found_credit(traces, methods)
    shown = {name: found[name] for name in methods or SHOWN_METHODS if name in found}
    recorded = recorded_credit(traces)
    if recorded is not None:
        shown = {"recorded": recorded, **shown}
    print_side_by_side(traces, shown, open_console(), groups=groups)
    if out:
        print(f"The page is {write_side_by_side(traces, found, file, out)}.")
    if write:
        _write_credit(file, methods[0], write)


def audit(
    run: str,
    /,
    *,
    methods: tuple[str, ...] = (),
    tasks: str | None = None,
    split: Literal["train", "validation", "test"] | None = None,
    groups: int = 16,
    group_size: int = 8,
    continuations: int = 16,
    rollouts: Path | None = None,
    checkpoint: Literal["best", "last"] = "best",
    seed: int = 0,
    out: Path | None = None,
    name: str = "audit",
) -> None:
    """Compare methods' credit with each turn's true advantage under a run's policy, by rollouts that are played on.

    Args:
        run: A run directory, a checkpoint folder, or "embedded".
        methods: Names of estimators, or "recorded" for the credit that saved rollouts have; by default the run's own
            and the best known.
        tasks: "atlas", "atlas-two-hop" or a file of questions; by default the run's own.
        split: Which of them; by default those of training.
        groups: Groups of rollouts to look at, one per question.
        group_size: Rollouts in a group.
        continuations: Rollouts that are played on from either end of each turn.
        rollouts: Take the last groups of this file, a run's rollouts.jsonl, instead of drawing new ones.
        checkpoint: The run's best by validation, or its last.
        seed: Decides all draws.
        out: Folder for what was drawn and found; by default the run directory, where it is one.
        name: What to call the files there; a stopped audit of that name goes on.
    """
    from turnwise.auditing import audit as audited
    from turnwise.display import audit_table

    check_place(name, out)
    found = audited(
        run,
        tasks,
        methods=methods,
        groups=groups,
        group_size=group_size,
        continuations=continuations,
        rollouts=rollouts,
        checkpoint=checkpoint,
        split=split,
        seed=seed,
        out=out,
        name=name,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    open_console().print(audit_table(run, found))
    for line in found.lines():
        print(line)


def _found_credit(traces: Sequence[Any], methods: Sequence[str]) -> dict[str, Any]:
    """The credit of the methods, or of all that can take the rollouts, where none is named."""
    from turnwise.traces import all_credit, traces_credit, traces_table

    table = traces_table(traces)
    if methods:
        return {name: traces_credit(name, traces, table) for name in methods}
    found, refused = all_credit(traces, table)
    for note in refused:
        print(note)
    return found


def _write_credit(file: Path, method: str, write: Path) -> None:
    """Writes traces of verifiers with a method's credit."""
    from turnwise.rundir import write_atomically
    from turnwise.traces import verifiers_lines

    lines = verifiers_lines(file, method)
    write_atomically(write, "".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} traces with the credit of {method} are in {write}.")


def _check_least(option: str, number: int, least: int) -> None:
    if number < least:
        raise ConfigError(f"{option} must be >= {least}; got {number}; give a larger number")


def _check_out(path: Path) -> None:
    """RunError, before any work, for a file that cannot be written."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RunError(f"{path} must be writable, in a folder that exists; it is not; choose another --out")


def lab(
    *,
    estimators: tuple[str, ...] = (),
    metric: str = "best_mse",
    group_sizes: tuple[int, ...] = (2, 4),
    groups: int = 2000,
    samples: int = 1000,
    out: Path | None = None,
) -> None:
    """Compare estimators' gradients with the exact one on small processes, and print the map.

    Args:
        estimators: Names of estimators; by default all that need no tree.
        metric: bias, cosine, variance, mse, best_mse, sign_agreement or rank_correlation.
        group_sizes: Rollouts in a group.
        groups: Most groups to enumerate; beyond that they are sampled, and the number is marked ~.
        samples: Groups to sample.
        out: Also write all numbers to OUT.json, and the map of this metric as a figure to OUT.svg.
    """
    from turnwise.credit import ESTIMATORS, NEEDS, WHOLE_STEP
    from turnwise.lab import METRICS, bias_map, heat_map, json_text, text_table

    if metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    able = [name for name in ESTIMATORS if "node" not in NEEDS.get(name, ())]
    for name in estimators:
        if name not in able:
            raise unknown_name("estimators", name, able)
    for option, number, least in (
        ("group-sizes", min(group_sizes, default=0), 1),
        ("groups", groups, 1),
        ("samples", samples, 2),
    ):
        _check_least(option, number, least)
    if max(group_sizes) > LARGEST_GROUP:
        raise ConfigError(
            f"group-sizes must be at most {LARGEST_GROUP}: larger groups take hours; got {max(group_sizes)}; "
            "give smaller ones, or call turnwise.lab.group_gradient for one problem"
        )
    for end in (".json", ".svg") if out else ():
        _check_out(Path(f"{out}{end}"))
    chosen = {name: ESTIMATORS[name] for name in estimators or able}
    whole = [name for name in chosen if name in WHOLE_STEP]
    rows = bias_map(chosen, group_sizes=group_sizes, per_group=whole, limit=groups, samples=samples)
    print(text_table(rows, metric))
    if out:
        try:
            Path(f"{out}.json").write_text(json_text(rows), encoding="utf-8")
            Path(f"{out}.svg").write_text(heat_map(rows, metric), encoding="utf-8")
        except OSError as error:
            raise RunError(f"{out} must be writable; got {error.strerror}; choose another --out") from error
        print(f"Written to {out}.json and {out}.svg.")


def doctor(trainer: str, /) -> int:
    """Check that a trainer's adapter works here, and say what to run where it does not.

    Args:
        trainer: "trl", "verl" or "skyrl".
    """
    from turnwise.adapters.doctor import examine, failed

    sick = False
    for finding in examine(trainer):
        sick = failed(finding)
        print(f"{'FAILED' if sick else 'ok'}  {finding.what}")
        if sick:
            print(f"to mend it:  {finding.fix}")
    return int(sick)
