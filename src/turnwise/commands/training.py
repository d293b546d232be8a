"""Commands that train: one run, a comparison, a starting checkpoint; and the look before it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from turnwise.commands.terminal import INTERRUPTED, open_console
from turnwise.errors import InputError, unknown_name

WARMUPS = ("tools", "search")
"""The protocols that `turnwise warmup` can teach."""


def train_command(args: Sequence[str]) -> Callable[..., int]:
    """`turnwise train`, whose defaults are those of the configuration file, if one is named."""
    import tyro

    from turnwise.config import TrainConfig

    default = _file_config(args)

    def train(
        file: Path | None = None,
        /,
        *,
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        resume: bool = False,
        dry_run: bool = False,
    ) -> int:
        """Train a policy and leave a run directory.

        Args:
            file: A TOML or JSON file of the options below, or a run's config.json; it comes first.
            config: The options; they override the file's.
            resume: Go on with the run in --out from its newest checkpoint.
            dry_run: Check everything, say how much memory the run would take, and leave nothing.
        """
        _check_file_first(file, args)
        if dry_run:
            from turnwise.training import planned_memory

            print(planned_memory(config).text())
            return 0
        return _train(config, resume=resume, given=_given(args))

    return train


def inspect_command(args: Sequence[str]) -> Callable[..., int]:
    """`turnwise inspect`, with the options and the file of `turnwise train`."""
    import tyro

    from turnwise.config import TrainConfig

    default = _file_config(args)

    def inspect(
        file: Path | None = None,
        /,
        *,
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        json: bool = False,
    ) -> int:
        """Look at what training would train on: prompts as the policy sees them, token counts, what search finds.

        Args:
            file: A TOML or JSON file of the options below, or a run's config.json; it comes first.
            config: The options of `turnwise train`.
            json: Write the findings as JSON.
        """
        _check_file_first(file, args)
        return _inspect(config, as_json=json)

    return inspect


def _inspect(config: Any, *, as_json: bool) -> int:
    """Prints what there is to see; 2 where training would not start."""

    from turnwise.inspection import inspect_tasks, inspection_lines

    found = inspect_tasks(config)
    print(json.dumps(found, indent=1) if as_json else "\n".join(inspection_lines(found)))
    return 2 if found["problems"] else 0


def _given(args: Sequence[str]) -> list[str]:
    """The options that stand on the command line, by their names in the configuration."""
    flags = [arg.split("=")[0] for arg in args if arg.startswith("--")]
    return [flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags]


def _train(config: Any, *, resume: bool, given: Sequence[str]) -> int:
    from turnwise.display import training_display
    from turnwise.training import resumed_config, train

    if resume:
        config = resumed_config(config, given=given)
    total = config.steps
    with training_display(f"{config.estimator} in {config.out}", total, open_console()) as display:
        result = train(config, resume=resume, display=display)
    if result.finished:
        print(f"The run is in {result.out}. What next:")
        print(f"  turnwise report {result.out}")
        print(f"  turnwise eval {result.out}")
        asked = '"What is the capital of Kenya?"' if config.environment is None else "TASK"
        print(f"  turnwise ask {result.out} {asked}")
        return 0
    print(f"Stopped after step {result.steps} of {total}; nothing is lost. To go on:")
    print(f"  turnwise train --resume --out {result.out}")
    return INTERRUPTED


def _file_config(args: Sequence[str]) -> Any:
    """The configuration in the file that the first argument names; else the default one."""
    from turnwise.config import TrainConfig, config_from_dict, read_config_file

    if not args or args[0].startswith("-"):
        return TrainConfig()
    return config_from_dict(read_config_file(Path(args[0])), args[0])


def _check_file_first(file: Path | None, args: Sequence[str]) -> None:
    if file is not None and str(file) != args[0] and Path(args[0]) != file:
        raise InputError(
            f"the configuration file must come before the options; got {str(file)!r} after them; write it first"
        )


def warmup_command(args: Sequence[str]) -> Callable[..., int]:
    """`turnwise warmup`; the protocol decides which options there are."""
    import tyro

    from turnwise.search_warmup import SearchWarmupConfig
    from turnwise.warmup import WarmupConfig

    if any(arg.partition("=")[0] == "--demonstrations" for arg in args):
        return _demonstrations_command()
    protocol = _option(args, "--protocol") or "tools"
    if protocol not in WARMUPS:
        raise unknown_name("protocol", protocol, WARMUPS)
    if protocol == "search":

        def search_warmup(*, config: Annotated[SearchWarmupConfig, tyro.conf.arg(name="")]) -> int:
            """Teach a checkpoint that can copy and read to search several times.

            Args:
                config: The options.
            """
            return _warmup(config)

        return search_warmup

    default = WarmupConfig()

    def warmup(*, config: Annotated[WarmupConfig, tyro.conf.arg(name="")] = default) -> int:
        """Make a starting checkpoint from demonstrations, as the embedded one was made.

        With --protocol search: teach a checkpoint that can copy and read to search several times.
        With --demonstrations FILE: teach a policy your own demonstrations.

        Args:
            config: The options.
        """
        return _warmup(config)

    return warmup


def _demonstrations_command() -> Callable[..., int]:
    """`turnwise warmup --demonstrations FILE`."""
    import tyro

    from turnwise.demonstrations import DemonstrationConfig

    def learn(*, config: Annotated[DemonstrationConfig, tyro.conf.arg(name="")]) -> int:
        """Teach a policy your own demonstrations: the loss is on what the assistant says in them.

        Args:
            config: The options.
        """
        return _learn_demonstrations(config)

    return learn


def _learn_demonstrations(config: Any) -> int:
    from turnwise.demonstrations import Counts, learn_demonstrations
    from turnwise.rundir import writing

    _make_empty(config.out)

    def watch(counts: Counts, step: int, read: int, loss: float) -> None:
        if step == 1:
            print(
                f"{counts.demonstrations:,} demonstrations, {counts.tokens:,} tokens, {counts.taught:,} of them the "
                f"assistant's; the longest has {counts.longest:,}"
            )
        if step % max(1, counts.steps // 20) == 0 or step in (1, counts.steps):
            print(f"step {step}/{counts.steps}  {read:,} tokens read  loss {loss:.4f}", flush=True)

    with writing(config.out):
        learn_demonstrations(config, watch)
    print(f"The checkpoint is in {config.out}. What next:")
    print(f"  turnwise train --policy {config.out} --protocol {config.protocol}")
    return 0


def _make_empty(folder: Path) -> None:
    """Makes the folder of a checkpoint; InputError where it holds files."""
    from turnwise.rundir import writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"--out must name a new or empty folder; {folder} holds files; choose another")


def _option(args: Sequence[str], name: str) -> str | None:
    """The value of an option in raw arguments: `--name value` or `--name=value`."""
    for number, arg in enumerate(args):
        given, equals, value = arg.partition("=")
        if given == name:
            return value if equals else next(iter(args[number + 1 :]), None)
    return None


def _warmup(config: Any) -> int:
    import time

    from turnwise.display import duration
    from turnwise.rundir import writing
    from turnwise.search_warmup import SearchWarmupConfig, search_warm_up
    from turnwise.warmup import warm_up

    _make_empty(config.out)
    started = time.perf_counter()

    def watch(_policy: Any, phase: str, step: int, loss: float) -> None:
        if step % 50 == 0 or step == config.steps:
            left = duration((time.perf_counter() - started) / step * (config.steps - step))
            print(f"{phase}  step {step}/{config.steps}  loss {loss:.3f}  {left} left", flush=True)

    with writing(config.out):
        if isinstance(config, SearchWarmupConfig):
            search_warm_up(config, watch)
        else:
            warm_up(config, watch)
    print(f"The checkpoint is in {config.out}. What next:")
    print(f"  turnwise eval {config.out}")
    print(f"  turnwise train --policy {config.out}")
    return 0


def reproduce_command(args: Sequence[str]) -> Callable[..., int]:
    """`turnwise reproduce`; a configuration file is what all runs share."""
    import tyro

    from turnwise import compare

    default = compare.ReproduceConfig(train=_file_config(args))

    def reproduce(
        file: Path | None = None,
        /,
        *,
        config: Annotated[compare.ReproduceConfig, tyro.conf.arg(name="")] = default,
    ) -> int:
        """Train several methods over several seeds, and write the table that compares them.

        Args:
            file: A TOML or JSON file of training options, as for `turnwise train`; it comes first.
            config: The options.
        """
        _check_file_first(file, args)
        result = compare.reproduce(config)
        print(result.with_suffix(".md").read_text(encoding="utf-8"))
        print(f"The numbers are in {result}. The page with curves and credit:")
        print(f"  turnwise report {config.runs / config.name}/*/")
        return 0

    return reproduce


def compare_design(
    file: Path,
    /,
    *,
    seeds: int | None = None,
    jobs: int | None = None,
    runs: Path = Path("runs/compare"),
    results: Path = Path("results"),
    dry_run: bool = False,
) -> int:
    """Train the arms of a comparison over its seeds, and write how they differ seed by seed.

    Stopped and started again, it goes on where it was.

    Args:
        file: The comparison: a TOML file with what is shared and a table for each arm (docs/compare.md).
        seeds: Seeds 0 .. seeds-1 instead of the file's.
        jobs: Runs at a time instead of the file's, each on one thread.
        runs: Folder of the run directories; runs that are there are continued, finished ones are kept.
        results: Folder of the result, NAME.json and NAME.md.
        dry_run: Check the file and say what would be run.
    """
    from rich.console import Console

    from turnwise import designs
    from turnwise.compare import check_arms
    from turnwise.display import comparison_display

    design = designs.read_design(file, seeds=seeds, jobs=jobs)
    if dry_run:
        check_arms(design.arms.values())
        for arm, baseline in design.baselines.items():
            print(f"{arm}: {design.arms[arm].estimator}{'' if arm == baseline else f', compared with {baseline}'}")
        print(f"{len(design.arms)} arms x {design.seeds} seeds = {len(design.arms) * design.seeds} runs")
        return 0
    console = Console()
    if console.is_terminal:
        with comparison_display(design.name, console) as show:
            result = designs.compare(design, runs=runs, results=results, look=lambda jobs: show(designs.progress(jobs)))
    else:
        result = designs.compare(design, runs=runs, results=results)
    print(result.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"The numbers are in {result}. The page with curves and credit:")
    print(f"  turnwise report {runs / design.name}/*/")
    return 0
