"""Commands that let a policy play: measured, asked, or served."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from turnwise.commands.terminal import check_place, open_console
from turnwise.errors import ConfigError, InputError

if TYPE_CHECKING:
    from turnwise.evaluation import Evaluation


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

    check_place(name, out)
    target = out or (Path(run) if is_run(Path(run)) else None)
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
    open_console().print(evaluation_table(title, evaluation_to_dict(evaluation)))
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
    console, turns = open_console(), 0
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
    from turnwise.serving.app import listening, load_served, make_app, server
    from turnwise.web import token_in

    token = token_in(token_env)
    with listening(host, port, token=token) as sock:
        served = load_served(run, name=name, checkpoint=checkpoint, engine=engine)
        agent, raw = served.names
        print(f"{agent} (the agent) and {raw} (the policy alone) on http://{host}:{sock.getsockname()[1]}/v1")
        print("POST /v1/chat/completions   GET /v1/models   GET /health   Ctrl-C stops", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server(make_app(served, token=token)).run(sockets=[sock])
        print("stopped")
