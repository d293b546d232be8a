"""The command line. Each command imports what it needs when it runs, so that help comes at once."""

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import turnwise
from turnwise.errors import ConfigError, InputError, RunError, TurnwiseError, unknown_name

if TYPE_CHECKING:
    from rich.console import Console

    from turnwise.evaluation import Evaluation

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the signal's number."""
BROKEN_PIPE = 141
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk says; files of ours have errors of ours, so these are of stdout."""
SHOWN_METHODS = ("grpo-or", "grpo-mr", "mt-grpo", "turn-rloo")
"""What `turnwise credit` prints unless told otherwise: as many as fit a line."""
WARMUPS = ("tools", "search")
"""The protocols that `turnwise warmup` can teach."""
LARGEST_GROUP = 128
"""Rollouts in a group that `turnwise lab` takes on."""
EXTRA_MODULES = ("torch", "transformers", "tokenizers", "safetensors")
"""What the extra `train` brings."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code: 0, 2 for input that cannot be used, 130 for Ctrl-C."""
    # torch's threads spin while they wait unless this is set before torch is imported, which makes
    # everything several times slower as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = lambda message, *_, **__: print(f"turnwise: warning: {message}", file=sys.stderr)
    try:
        code = run_command(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in EXTRA_MODULES:
            raise
        return _failed(f'this command needs {missing}; install it: pip install "turnwise[train]"', 2)
    except (TurnwiseError, ExceptionGroup) as error:
        ours = _first_of_ours(error)
        if ours is None:
            raise
        return _failed(str(ours), 2)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _drop_output()
        return _failed(f"the output must have room; got {error.strerror}; free space, or write it elsewhere", 2)


def _drop_output() -> None:
    """What is still to be written to stdout goes nowhere: the interpreter flushes once more when it ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def run_command(args: list[str]) -> int:
    """The chosen command's exit code. ConfigError, with the nearest names, for an unknown one."""
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"turnwise {turnwise.__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        raise unknown_name("the command", name, COMMANDS)
    import tyro

    command = COMMANDS[name]
    function = command.function or _built(name, rest)

    @functools.wraps(function)
    def chosen(*values: Any, **options: Any) -> Callable[[], int | None]:
        return functools.partial(function, *values, **options)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            call = tyro.cli(chosen, prog=f"turnwise {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:  # after --help, or after tyro has said what is wrong
        if not stop.code:
            return 0
        raise ConfigError(_unboxed(said.getvalue(), name)) from None
    return call() or 0


def _unboxed(text: str, command: str) -> str:
    """What tyro says of wrong options, without its frame: the fault, the nearest options, where the others are."""
    lines = [line.strip("│|+╭╮╰╯ ") for line in text.splitlines()]
    ruled = [line if line.strip("─-") else "" for line in lines]
    after_title = itertools.dropwhile(lambda line: not line, ruled[1:])
    fault = " ".join(itertools.takewhile(bool, after_title))
    fault = re.sub(r"'None', |, 'None'(?=\))", "", fault).rstrip(".")  # an option left out is no choice to name
    options = dict.fromkeys(re.findall(r"^--[a-z][\w.-]*", "\n".join(lines), flags=re.MULTILINE))
    meant = f"; perhaps {' or '.join(list(options)[:3])}" if options and "perhaps" in text.lower() else ""
    return f"{fault}{meant}; `turnwise {command} --help` shows the options"


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: turnwise COMMAND [...]",
            "",
            "Reinforcement learning with turn-level credit for agents that use tools.",
            "",
            *lines,
            "",
            "turnwise COMMAND --help shows a command's options; turnwise --version the version.",
        ]
    )


def _failed(text: str, code: int) -> int:
    """Says on one line of stderr what went wrong."""
    from turnwise.report.text import one_line

    print(f"turnwise: {one_line(text)}", file=sys.stderr)
    return code


def _first_of_ours(error: BaseException) -> TurnwiseError | None:
    """The error itself, or the first of ours in a group that concurrent rollouts raised."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_first_of_ours, error.exceptions)), None)
    return error if isinstance(error, TurnwiseError) else None


def _console() -> "Console":
    """A terminal that takes no text as markup, and is not narrowed where there is none."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # to `main`, instead of ending the process here

    width = None if sys.stdout.isatty() else 110
    return Terminal(markup=False, highlight=False, emoji=False, width=width)


# --- commands that search and convert -------------------------------------------------------------


def search(query: str, /, *, corpus: str = "atlas", k: int = 3) -> None:
    """Search a corpus as the agent's tool does.

    Args:
        query: A question or a few words.
        corpus: "atlas", a JSON-lines file, or a folder of text files.
        k: Most articles to show.
    """
    from rich.text import Text

    from turnwise.report.text import one_line, visible
    from turnwise.search import open_index

    console = _console()
    whole = not console.is_terminal  # lines of a file or pipe are not broken
    hits = open_index(corpus).search(query, k)
    for number, hit in enumerate(hits, start=1):
        head = f"{number}. {one_line(hit.title) or one_line(hit.id)}"
        console.print(Text.assemble((head, "bold"), (f"  {hit.score:.2f}", "dim")))
        console.print(Text(visible(hit.text)), soft_wrap=whole)
        console.print()
    if not hits:
        console.print("No results.")


def serve_search(*, corpus: str = "atlas", host: str = "127.0.0.1", port: int = 8765) -> None:
    """Serve a corpus's search over HTTP, in Search-R1's format too.

    Args:
        corpus: "atlas", a JSON-lines file, or a folder of text files.
        host: Address to listen on; 0.0.0.0 lets other machines ask.
        port: Port to listen on; 0 takes any free one.
    """
    from turnwise.search import open_index, search_server

    index = open_index(corpus)
    with search_server(index, host=host, port=port) as server:
        print(f"{len(index):,} articles on http://{host}:{server.server_address[1]}; Ctrl-C stops")
        print("GET /search?q=...&k=3   POST /retrieve   GET /health", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def convert(source: Path, out: Path, /, *, format: str = "auto") -> None:
    """Make a task file and a corpus from TriviaQA's, SQuAD's, HotpotQA's or MuSiQue's own files.

    Args:
        source: The question set's file.
        out: Task file to write, NAME.jsonl or NAME.jsonl.gz; passages go to NAME.corpus.jsonl.gz.
        format: triviaqa, squad, hotpotqa, musique, or auto.
    """
    from turnwise.convert import FORMATS
    from turnwise.convert import convert as converted

    known = {"auto": "auto", **{name: name for name in FORMATS}}
    if format not in known:
        raise unknown_name("format", format, known)
    done = converted(source, out, known[format])  # pyright: ignore[reportArgumentType]
    skipped = f", {done.skipped:,} without an answer left out" if done.skipped else ""
    print(f"{done.tasks:,} tasks of {done.format} in {done.tasks_path}{skipped}")
    if done.corpus_path:
        print(f"{done.articles:,} passages in {done.corpus_path}")


# --- training -------------------------------------------------------------------------------------


def _train_command(args: Sequence[str]) -> Callable[..., int]:
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
    ) -> int:
        """Train a policy and leave a run directory.

        Args:
            file: A TOML or JSON file of the options below, or a run's config.json; it comes first.
            config: The options; they override the file's.
            resume: Go on with the run in --out from its newest checkpoint.
        """
        _check_file_first(file, args)
        return _train(config, resume=resume, given=_given(args))

    return train


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
    with training_display(f"{config.estimator} in {config.out}", total, _console()) as display:
        result = train(config, resume=resume, display=display)
    if result.finished:
        print(f"The run is in {result.out}. What next:")
        print(f"  turnwise report {result.out}")
        print(f"  turnwise eval {result.out}")
        print(f'  turnwise ask {result.out} "What is the capital of Kenya?"')
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


def _warmup_command(args: Sequence[str]) -> Callable[..., int]:
    """`turnwise warmup`; the protocol decides which options there are."""
    import tyro

    from turnwise.search_warmup import SearchWarmupConfig
    from turnwise.warmup import WarmupConfig

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

        Args:
            config: The options.
        """
        return _warmup(config)

    return warmup


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

    with writing(config.out):
        config.out.mkdir(parents=True, exist_ok=True)
    if any(config.out.iterdir()):
        raise InputError(f"--out must name a new or empty folder; {config.out} holds files; choose another")
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


def _reproduce_command(args: Sequence[str]) -> Callable[..., int]:
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


# --- commands that read a run ---------------------------------------------------------------------


def evaluate(
    run: str,
    /,
    *,
    tasks: str | None = None,
    split: Literal["train", "validation", "test"] | None = None,
    mode: Literal["greedy", "sampled"] = "greedy",
    limit: int | None = None,
    checkpoint: Literal["best", "last"] = "best",
    seed: int = 0,
    name: str | None = None,
    judge: bool = True,
) -> None:
    """Measure a run's policy on questions, with confidence intervals.

    Args:
        run: A run directory, a checkpoint folder, or "embedded".
        tasks: "atlas", "atlas-two-hop" or a file of questions; by default the run's own.
        split: Which of them; by default the atlas's test split, or a file's validation questions.
        mode: Take the most probable tokens, or draw them as in training.
        limit: Play so many questions, evenly spaced over all of them.
        checkpoint: The run's best by validation, or its last.
        seed: Decides the draws of --mode sampled.
        name: What to call the result in the run directory; by default the split's or file's name.
        judge: Leave the run's judge in peace, if it has one.
    """
    from turnwise.evaluation import evaluate as evaluated
    from turnwise.evaluation import is_run, write_evaluation

    if name is not None and not re.fullmatch(r"[\w][\w.-]*", name):
        raise ConfigError(f"name must be letters, digits, '-', '_' or '.'; got {name!r}; rename it")
    evaluation = evaluated(
        run,
        tasks,
        split=split,
        mode=mode,
        limit=limit,
        checkpoint=checkpoint,
        seed=seed,
        name=name,
        judge=judge,
    )
    _print_evaluation(run, evaluation)
    if is_run(Path(run)):
        path = write_evaluation(Path(run), evaluation)
        print(f"Written to {path}, and question by question to {path.with_suffix('.jsonl').name}.")


def _print_evaluation(run: str, evaluation: "Evaluation") -> None:
    from turnwise.display import evaluation_table
    from turnwise.evaluation import evaluation_to_dict

    title = f"{run} on {evaluation.name}, {evaluation.mode}: per cent, 95 % interval below"
    _console().print(evaluation_table(title, evaluation_to_dict(evaluation)))
    if evaluation.judge:
        numbers = {name.removeprefix("judge/"): value for name, value in evaluation.judge.items()}
        print("judge: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    failed = [rollout for _, rollout in evaluation.records if rollout.stop == "error"]
    if failed:
        total = len(evaluation.records)
        print(f"{len(failed)} of {total} rollouts failed and are left out; the first:")
        print(f"  {failed[0].error!a}")


def ask(
    run: str,
    question: str,
    /,
    *,
    corpus: str | None = None,
    mode: Literal["greedy", "sampled"] = "greedy",
    checkpoint: Literal["best", "last"] = "best",
    seed: int = 0,
) -> None:
    """Ask a run's policy a question and watch it work, turn by turn.

    Args:
        run: A run directory, a checkpoint folder, or "embedded".
        question: The question.
        corpus: What to search instead of the run's corpus: "atlas", a JSON-lines file, or a folder.
        mode: Take the most probable tokens, or draw them as in training.
        checkpoint: The run's best by validation, or its last.
        seed: Decides the draws of --mode sampled.
    """
    import asyncio

    from rich.text import Text

    from turnwise.display import Watched, turn_panel
    from turnwise.env import Step, ToolEnvironment
    from turnwise.evaluation import make_engine, rollout_limits, run_policy
    from turnwise.report.text import visible
    from turnwise.rollout import run_rollout
    from turnwise.setting import make_tools
    from turnwise.types import Task

    if not question.strip():
        raise InputError("the question must not be blank; got none; ask something")
    console, turns = _console(), 0
    policy, config = run_policy(run, checkpoint)
    if corpus:
        config = dataclasses.replace(config, corpus=corpus, tools=None)

    def watch(text: str, step: Step) -> None:
        nonlocal turns
        turns += 1
        console.print(turn_panel(turns, text, step))

    task = Task(id="question", question=question, answers=())
    tools = make_tools(config, ())
    environment = ToolEnvironment(task, tools, max_turns=config.max_turns, protocol=config.protocol)
    rollout = asyncio.run(
        run_rollout(
            task,
            Watched(environment, watch),
            make_engine(policy),
            policy.chat,
            limits=rollout_limits(config, policy),
            temperature=0.0 if mode == "greedy" else config.temperature,
            seed=seed,
        )
    )
    if rollout.stop == "max_tokens":
        cut = rollout.turns[-1].text if len(rollout.turns) > turns else ""
        console.print(Text(visible(f"{cut}\n(cut off: no room for more tokens)").lstrip()))
    if rollout.error:
        raise InputError(f"the tools must not fail; got {rollout.error}; correct them")


def report(runs: tuple[Path, ...], /, *, out: Path | None = None) -> None:
    """Print the paper's table of some runs, and write a page with curves and the credit of turns.

    Args:
        runs: Run directories.
        out: Page to write; by default report.html, in the run directory where there is one run.
    """
    from turnwise.report import load_run, paper_table, print_table, table_notes, write_report

    if not runs:
        raise InputError("a report must be of at least one run; got none; name run directories")
    loaded = [load_run(run) for run in runs]
    print_table(paper_table(loaded), _console())
    for note in table_notes(loaded):
        print(note)
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    print(f"The page is {write_report(loaded, out or default)}.")


def credit(file: Path, /, *, methods: tuple[str, ...] = (), groups: int = 3, out: Path | None = None) -> None:
    """Compute the credit of recorded rollouts by several methods, side by side.

    Args:
        file: A run's rollouts.jsonl, or JSON lines of turns and rewards (see docs/credit.md).
        methods: Names of estimators; by default some of the best known here, and on the page all that the file has the
            fields for. Of those with an advantage per token the mean over each turn's tokens is shown.
        groups: Groups to print.
        out: Also write an HTML page there.
    """
    from turnwise.credit import ESTIMATORS, TOKEN_ESTIMATORS
    from turnwise.report.side import print_side_by_side, write_side_by_side
    from turnwise.traces import all_credit, lacking, read_traces, traces_credit, traces_table

    known = (*ESTIMATORS, *TOKEN_ESTIMATORS)
    for name in methods:
        if name not in known:
            raise unknown_name("methods", name, known)
    _check_least("groups", groups, 1)
    if out:
        _check_out(out)
    traces = read_traces(file)
    for name in methods:
        if missing := " and ".join(lacking(name, traces)):
            raise InputError(
                f"{file} must have {missing} in every turn for {name}; it has not; add it, or leave it out"
            )
    table = traces_table(traces)
    if methods:
        found = {name: traces_credit(name, traces, table) for name in methods}
    else:
        found, refused = all_credit(traces, table)
        for note in refused:
            print(note)
    shown = {name: found[name] for name in methods or SHOWN_METHODS if name in found}
    print_side_by_side(traces, shown, _console(), groups=groups)
    if out:
        print(f"The page is {write_side_by_side(traces, found, file, out)}.")


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
        trainer: "trl" or "verl".
    """
    from turnwise.adapters.doctor import examine, failed

    sick = False
    for finding in examine(trainer):
        sick = failed(finding)
        print(f"{'FAILED' if sick else 'ok'}  {finding.what}")
        if sick:
            print(f"to mend it:  {finding.fix}")
    return int(sick)


# --- the commands ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it does, and its function or, where options need an import, what makes it."""

    summary: str
    function: Callable[..., Any] | None = None
    build: Callable[[Sequence[str]], Callable[..., int]] | None = None


COMMANDS = {
    "train": Command("train a policy and leave a run directory", build=_train_command),
    "eval": Command("measure a policy on questions, with intervals", evaluate),
    "ask": Command("ask a policy a question and watch it work", ask),
    "report": Command("table, curves and the credit of every turn, from runs", report),
    "credit": Command("credit of recorded rollouts by several methods, side by side", credit),
    "lab": Command("compare estimators with exact gradients on small processes", lab),
    "search": Command("search a corpus as the agent's tool does", search),
    "serve-search": Command("serve a corpus's search over HTTP", serve_search),
    "doctor": Command("check that turn credit works inside another trainer (trl, verl)", doctor),
    "convert": Command("make task and corpus files from public question sets", convert),
    "warmup": Command("make a starting checkpoint from demonstrations", build=_warmup_command),
    "reproduce": Command("compare methods over seeds", build=_reproduce_command),
}


def _built(name: str, args: Sequence[str]) -> Callable[..., int]:
    build = COMMANDS[name].build
    assert build is not None, f"command {name} has neither a function nor a builder"
    return build(args)


if __name__ == "__main__":
    sys.exit(main())
