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
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors"), "train"),
    **dict.fromkeys(("starlette", "uvicorn"), "serve"),
    "peft": "lora",
}
"""The extra that brings each module."""


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
        if missing not in EXTRAS:
            raise
        return _failed(f'this command needs {missing}; install it: pip install "turnwise[{EXTRAS[missing]}]"', 2)
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
    """Make a task file and a corpus from a public question set.

    Args:
        source: The question set's file, or hf:NAME[:CONFIG][:SPLIT].
        out: Task file to write, NAME.jsonl or NAME.jsonl.gz; passages go to NAME.corpus.jsonl.gz.
        format: triviaqa, squad, hotpotqa, musique, popqa, bamboogle, gsm8k, flashrag, or auto.
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


def convert_weights(weights: Path, tokenizer: Path, out: Path, /) -> None:
    """Make a checkpoint of a small pretrained Llama in llama2.c's legacy layout.

    Args:
        weights: The model's file, such as stories260K.bin.
        tokenizer: The tokenizer's file, such as tokenizer.bin.
        out: The folder to make.
    """
    from turnwise.llama2c import convert_llama2c
    from turnwise.rundir import writing

    with writing(out):
        convert_llama2c(weights, tokenizer, out)
    print(f"The checkpoint is in {out}; `turnwise train --policy {out}` begins with it.")


def export(run: str, /, *, out: Path, checkpoint: Literal["best", "last"] = "best") -> None:
    """Write a run's policy as a plain checkpoint that transformers loads; an adapter is merged into its base model.

    Args:
        run: A run directory or a checkpoint folder.
        out: The folder to make.
        checkpoint: The run's best by validation, or its last.
    """
    from turnwise.exporting import export as exported

    print(f"The checkpoint is in {exported(run, out, checkpoint=checkpoint)}.")


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


def _inspect_command(args: Sequence[str]) -> Callable[..., int]:
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
    import json

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
    with training_display(f"{config.estimator} in {config.out}", total, _console()) as display:
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


def _warmup_command(args: Sequence[str]) -> Callable[..., int]:
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


# --- commands that read a run ---------------------------------------------------------------------


def evaluate(
    run: str,
    /,
    *,
    tasks: str | None = None,
    split: Literal["train", "validation", "test"] | None = None,
    mode: Literal["greedy", "sampled"] | None = None,
    limit: int | None = None,
    checkpoint: Literal["best", "last"] = "best",
    seed: int = 0,
    name: str | None = None,
    judge: bool = True,
    samples: int = 1,
    pass_at: str = "",
    max_turn_tokens: int | None = None,
    engine: Literal["hf", "vllm"] | None = None,
    endpoint: str | None = None,
    model: str | None = None,
    key_env: str | None = None,
    concurrency: int = 8,
    timeout_s: float = 120.0,
    out: Path | None = None,
    environment: str | None = None,
    max_turns: int | None = None,
) -> None:
    """Measure a run's policy on questions, or any model behind an OpenAI-compatible endpoint, with intervals.

    Args:
        run: A run directory, a checkpoint folder, "embedded", or a file of options, whose policy is not trained yet.
        tasks: "atlas", "atlas-two-hop" or a file of questions; by default the run's own.
        split: Which of them; by default the atlas's test split, or a file's validation questions.
        mode: Take the most probable tokens, or draw them as in training; by default greedy, with --samples sampled.
        limit: Play so many questions, evenly spaced over all of them.
        checkpoint: The run's best by validation, or its last.
        seed: Decides the draws of --mode sampled.
        name: What to call the result; by default the split's or file's name, and the model's with --endpoint.
        judge: Leave the run's judge in peace, if it has one.
        samples: Rollouts of each question.
        pass_at: Numbers k, as in 1,4,8: also estimate the chance that one of k samples matches exactly.
        max_turn_tokens: Most tokens of a turn, instead of the run's own number.
        engine: What draws, instead of the run's own engine: hf or vllm.
        endpoint: Ask the model there, in the run's environment: an address such as http://127.0.0.1:8000/v1.
        model: The endpoint's name for the model.
        key_env: The environment variable that holds the endpoint's key, where it wants one.
        concurrency: Most requests to the endpoint at once.
        timeout_s: Seconds that one request may take.
        out: Folder for the result; by default the run directory, where it is one.
        environment: Play in this environment instead of the run's, on its tasks (see docs/environments.md).
        max_turns: Most turns of a rollout, instead of the run's.
    """
    from turnwise.evaluation import evaluate as evaluated
    from turnwise.evaluation import is_run, write_evaluation

    if name is not None and not re.fullmatch(r"[\w][\w.-]*", name):
        raise ConfigError(f"name must be letters, digits, '-', '_' or '.'; got {name!r}; rename it")
    target = out or (Path(run) if is_run(Path(run)) else None)
    if target and not target.is_dir():
        raise RunError(f"out must be a folder; {target} is none; make it, or choose another")
    evaluation = evaluated(
        run,
        tasks,
        split=split,
        mode=mode or ("greedy" if samples == 1 else "sampled"),
        limit=limit,
        checkpoint=checkpoint,
        seed=seed,
        name=name,
        judge=judge,
        samples=samples,
        pass_at=_whole_numbers("pass-at", pass_at),
        max_turn_tokens=max_turn_tokens,
        engine=engine,
        endpoint=_endpoint(endpoint, model, key_env, concurrency, timeout_s),
        environment=environment,
        max_turns=max_turns,
    )
    _print_evaluation(model or run, evaluation)
    if target:
        path = write_evaluation(target, evaluation)
        print(f"Written to {path}, and question by question to {path.with_suffix('.jsonl').name}.")


def _endpoint(url: str | None, model: str | None, key_env: str | None, concurrency: int, timeout_s: float) -> Any:
    """The endpoint to ask, if one is named."""
    from turnwise.endpoint import EndpointConfig

    if url is None:
        if model or key_env:
            raise ConfigError("model and key-env must come with an endpoint; there is none; name it with --endpoint")
        return None
    return EndpointConfig(
        url=url, model=model or "", key_env=key_env, concurrency=concurrency, timeout_s=timeout_s, backoff_s=1.0
    )


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """The numbers in a text such as 1,4,8."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise ConfigError(f"{option} must be whole numbers with commas between; got {text!r}; write 1,4,8")
    return tuple(map(int, parts))


def _print_evaluation(run: str, evaluation: "Evaluation") -> None:
    from turnwise.display import evaluation_table
    from turnwise.evaluation import evaluation_to_dict

    title = f"{run} on {evaluation.name}, {evaluation.mode}: per cent, 95 % interval below"
    _console().print(evaluation_table(title, evaluation_to_dict(evaluation)))
    if evaluation.judge:
        numbers = {name.removeprefix("judge/"): value for name, value in evaluation.judge.items()}
        print("judge: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    if evaluation.endpoint:
        print("endpoint: " + ", ".join(f"{name} {value:.6g}" for name, value in evaluation.endpoint.items()))
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
    environment: str | None = None,
    max_turns: int | None = None,
) -> None:
    """Ask a run's policy a question and watch it work, turn by turn.

    Args:
        run: A run directory, a checkpoint folder, or "embedded".
        question: The question; in an environment of seeds the seed, in one of games the game's name, in a module's
            the id or question of one of its tasks, or another question.
        corpus: What to search instead of the run's corpus: "atlas", a JSON-lines file, or a folder.
        mode: Take the most probable tokens, or draw them as in training.
        checkpoint: The run's best by validation, or its last.
        seed: Decides the draws of --mode sampled.
        environment: Play in this environment instead of the run's (see docs/environments.md).
        max_turns: Most turns, instead of the run's.
    """
    import asyncio

    from rich.text import Text

    from turnwise.display import Watched, turn_panel
    from turnwise.env import Step, ToolEnvironment
    from turnwise.evaluation import elsewhere, make_engine, rollout_limits, run_policy
    from turnwise.report.text import visible
    from turnwise.rollout import run_rollout
    from turnwise.setting import environment_source, make_tools, played_protocol
    from turnwise.toolbox.sources import source_names
    from turnwise.types import Message, Task

    if not question.strip():
        raise InputError("the question must not be blank; got none; ask something")
    console, turns = _console(), 0
    policy, config = run_policy(run, checkpoint)
    config = elsewhere(config, environment, max_turns)
    if corpus:
        others = config.tools if "search" in source_names(config.tools) else None
        config = dataclasses.replace(config, corpus=corpus, tools=others)
    config = dataclasses.replace(config, protocol=played_protocol(config))
    source = environment_source(config)

    def watch(text: str, step: Step) -> None:
        nonlocal turns
        turns += 1
        console.print(turn_panel(turns, text, step))

    def begin(messages: tuple[Message, ...]) -> None:
        for message in messages if source else ():
            console.print(Text(visible(message.content), style="dim" if message.role == "system" else ""))

    if source:
        task = source.task_of(question)
        playing = source.environment(task, config.max_turns)
    else:
        task = Task(id="question", question=question)
        tools = make_tools(config, ())
        playing = ToolEnvironment(task, tools, max_turns=config.max_turns, protocol=config.protocol)
    rollout = asyncio.run(
        run_rollout(
            task,
            Watched(playing, watch, begin),
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
        raise InputError(f"the {'environment' if source else 'tools'} must not fail; got {rollout.error}; correct it")


def serve(
    run: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_env: str | None = None,
    name: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    engine: Literal["hf", "vllm"] = "hf",
) -> None:
    """Serve a run's agent as an OpenAI-compatible chat endpoint.

    Args:
        run: A run directory, a checkpoint folder, or "embedded".
        host: Address to listen on; another than this machine's own needs a token.
        port: Port to listen on; 0 takes any free one.
        token_env: The environment variable that holds the token which clients must send.
        name: The model's name; by default the run's folder.
        checkpoint: The run's best by validation, or its last.
        engine: What draws: hf in this process, or vllm on a GPU.
    """
    from turnwise.serving.app import listening, load_served, make_app, server, token_in

    token = token_in(token_env)
    with listening(host, port, token=token) as sock:
        served = load_served(run, name=name, checkpoint=checkpoint, engine=engine)
        agent, raw = served.names
        print(f"{agent} (the agent) and {raw} (the policy alone) on http://{host}:{sock.getsockname()[1]}/v1")
        print("POST /v1/chat/completions   GET /v1/models   GET /health   Ctrl-C stops", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server(make_app(served, token=token)).run(sockets=[sock])
        print("stopped")


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
    print_side_by_side(traces, shown, _console(), groups=groups)
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

    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise ConfigError(f"name must be letters, digits, '-', '_' or '.'; got {name!r}; rename it")
    if out and not out.is_dir():
        raise RunError(f"out must be a folder; {out} is none; make it, or choose another")
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
    _console().print(audit_table(run, found))
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
    "inspect": Command("look at questions as the policy will see them, before training", build=_inspect_command),
    "eval": Command("measure a policy on questions, with intervals", evaluate),
    "ask": Command("ask a policy a question and watch it work", ask),
    "serve": Command("serve a run's agent as an OpenAI-compatible chat endpoint", serve),
    "export": Command("write a run's policy as a plain checkpoint", export),
    "report": Command("table, curves and the credit of every turn, from runs", report),
    "credit": Command("credit of recorded rollouts by several methods, side by side", credit),
    "audit": Command("compare methods' credit with true advantages under a run's policy", audit),
    "lab": Command("compare estimators with exact gradients on small processes", lab),
    "search": Command("search a corpus as the agent's tool does", search),
    "serve-search": Command("serve a corpus's search over HTTP", serve_search),
    "doctor": Command("check that turn credit works inside another trainer (trl, verl)", doctor),
    "convert": Command("make task and corpus files from public question sets", convert),
    "convert-weights": Command("make a checkpoint of llama2.c's weights", convert_weights),
    "warmup": Command("make a starting checkpoint from demonstrations", build=_warmup_command),
    "compare": Command("compare arms of a design over seeds, seed by seed", compare_design),
    "reproduce": Command("compare methods over seeds", build=_reproduce_command),
}


def _built(name: str, args: Sequence[str]) -> Callable[..., int]:
    build = COMMANDS[name].build
    assert build is not None, f"command {name} has neither a function nor a builder"
    return build(args)


if __name__ == "__main__":
    sys.exit(main())
