"""Playing tasks: an environment and an engine make a rollout; many run at once.

Tokens go in and tokens come out. What was sampled is kept as it was sampled; the environment's text is tokenised
once, when it arrives, and appended.
"""

import asyncio
import dataclasses
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from turnwise.chat import Chat
from turnwise.engine import Completion, Engine, ForkingEngine, Sampling
from turnwise.env import Environment, Step, closed, forked, seeded, started, state_of, stepped
from turnwise.errors import ConfigError, InputError, NotFinite, described
from turnwise.types import Action, Rollout, Stop, Task, Turn

T = TypeVar("T")

MakeEnvironment = Callable[[Task], Environment]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Budgets of a rollout, in tokens."""

    max_turn_tokens: int = 96
    """Most sampled tokens of one turn."""
    context: int
    """Most tokens of the whole conversation."""
    max_turns: int = 1
    """Turns that are granted; replies leave room for those still to come."""


WORD = 2**32 - 1


def rollout_seed(*parts: int) -> int:
    """A seed for one rollout's sampling out of the run's seed, the step, the task and the rollout's number.

    Equal parts give equal seeds on every machine, so two runs that differ in their estimator draw alike.
    """
    if min(parts, default=0) < 0:
        raise ValueError(f"the parts of a seed must not be negative; got {parts}")
    words = [len(parts)]  # because numpy draws alike from (1,) and (1, 0)
    for part in map(int, parts):  # as numpy splits integers, in half the time
        words.append(part & WORD)
        while part > WORD:
            part >>= 32
            words.append(part & WORD)
    return int(np.random.SeedSequence(np.array(words, np.uint32)).generate_state(1, np.uint64)[0])


@dataclasses.dataclass(eq=False, kw_only=True)
class _Line:
    """A conversation under way, in a session of the engine."""

    environment: Environment
    prompt: tuple[int, ...]
    seed: int
    turns: list[Turn] = dataclasses.field(default_factory=list)
    path: tuple[int, ...] = ()
    """Which child of the state before it each turn is."""
    session: object = dataclasses.field(default_factory=object)
    stop: Stop | None = None
    error: str | None = None
    success: bool | None = None
    state: str | None = None
    """The environment's name of the state that it is in."""
    states: list[str | None] = dataclasses.field(default_factory=list)
    """Its names of the states before the turns."""
    ids: list[int] = dataclasses.field(init=False)
    """The whole conversation."""

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        for turn in self.turns:
            self.ids += turn.action_ids
            self.ids += turn.reply_ids

    def add(self, turn: Turn) -> None:
        """Appends a turn."""
        self.turns.append(turn)
        self.ids += turn.action_ids
        self.ids += turn.reply_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Player:
    """What all lines of one task have in common."""

    task: Task
    engine: Engine
    chat: Chat
    limits: Limits
    temperature: float
    group: int

    async def line(self, environment: Environment, seed: int) -> _Line:
        """The line of an environment that starts. Raises InputError where its prompt leaves no room for one turn."""
        try:
            seeded(environment, seed)
            prompt = tuple(self.chat.prompt_ids(await started(environment)))
            state = state_of(environment)
        except Exception as failure:  # whatever a user's environment raises is a fact about this rollout
            return _Line(environment=environment, prompt=(), seed=seed, stop="error", error=described(failure))
        if len(prompt) + self.limits.max_turn_tokens > self.limits.context:
            await closed(environment)
            raise InputError(
                f"the prompt of task {self.task.id!r} must leave room for a turn of {self.limits.max_turn_tokens} "
                f"tokens in a context of {self.limits.context}; it has {len(prompt)} tokens; shorten it, or take "
                "a policy with a longer context"
            )
        return _Line(environment=environment, prompt=prompt, seed=seed, state=state)

    async def play(self, line: _Line, at_state: Callable[[_Line], None] = lambda line: None) -> None:
        """Plays a line to its end. `at_state` is called whenever the policy is about to go on after a turn."""
        try:
            while line.stop is None:
                await self._turn(line)
                line.path = (*line.path, 0)[: len(line.turns)]
                if line.stop is None:
                    at_state(line)
        finally:
            self.engine.release(line.session)
            await closed(line.environment)

    async def _turn(self, line: _Line) -> None:
        """Draws the line's next turn and lets its environment answer."""
        sampling = Sampling(
            temperature=self.temperature,
            max_tokens=self.limits.max_turn_tokens,
            seed=rollout_seed(line.seed, len(line.turns)),
        )
        try:
            completion = await self.engine.generate(tuple(line.ids), sampling, session=line.session)
        except NotFinite as failure:
            line.stop, line.error = "error", described(failure)
            return
        await self.take(line, completion)

    async def take(self, line: _Line, completion: Completion) -> None:
        """Takes a turn and lets the line's environment answer it."""
        text = self.chat.decode(completion.token_ids)
        step, reply, rewards = Step(action=Action()), [], {}
        line.states.append(line.state)
        if completion.finish == "length":
            line.stop = "max_tokens"
        else:
            try:
                step = await stepped(line.environment, text)
                rewards, line.state = finite_rewards(step.rewards), state_of(line.environment)
                line.stop, line.error = step.stop, step.error
                line.success = line.success if step.success is None else step.success
            except Exception as failure:
                line.stop, line.error = "error", described(failure)
        if line.stop is None:
            used = len(line.ids) + len(completion.token_ids)
            room = reply_room(self.chat, self.limits, used, len(line.turns) + 1)
            reply = self.chat.reply_ids(step.reply, max_ids=room)
            if len(reply) > room:
                line.stop, reply = "max_tokens", []
        line.add(_turn(completion, text, step, reply, rewards))

    def rollout(self, line: _Line) -> Rollout:
        """The record of a line that has ended."""
        assert line.stop is not None
        return Rollout(
            task_id=self.task.id,
            group=self.group,
            prompt_ids=line.prompt,
            turns=tuple(line.turns),
            stop=line.stop,
            error=line.error,
            success=line.success,
            states=tuple(state for state in line.states if state is not None) if None not in line.states else (),
            policy_version=self.engine.policy_version,
        )


async def run_rollout(
    task: Task,
    environment: Environment,
    engine: Engine,
    chat: Chat,
    *,
    limits: Limits,
    temperature: float = 1.0,
    seed: int = 0,
    group: int = 0,
) -> Rollout:
    """One task played to its end.

    A failure of the environment is recorded in the rollout (stop `error`, without turns where it could not start), and
    so are logits that are not finite; other failures of the engine are raised. Every granted turn has room for
    `max_turn_tokens`: a reply that would take it is cut. Raises InputError where the prompt leaves no room for a turn.
    """
    player = _Player(task=task, engine=engine, chat=chat, limits=limits, temperature=temperature, group=group)
    line = await player.line(environment, seed)
    await player.play(line)
    return player.rollout(line)


async def run_on(
    task: Task,
    environment: Environment,
    engine: Engine,
    chat: Chat,
    *,
    prompt_ids: Sequence[int],
    turns: Sequence[Turn],
    again: Turn | None = None,
    limits: Limits,
    temperature: float = 1.0,
    seed: int = 0,
    group: int = 0,
) -> Rollout:
    """A rollout that has taken some turns already, played on to its end.

    `environment` stands in the state after them. The turn `again` is taken there as it was, and answered anew, before
    the policy goes on. Failures are as in `run_rollout`.
    """
    player = _Player(task=task, engine=engine, chat=chat, limits=limits, temperature=temperature, group=group)
    line = _Line(
        environment=environment,
        prompt=tuple(prompt_ids),
        seed=seed,
        turns=list(turns),
        states=[None] * len(turns),
    )
    if again:
        whole = again.action_ids[-1:] and again.action_ids[-1] in chat.stop_ids
        finish = "stop" if whole else "length"
        await player.take(line, Completion(token_ids=again.action_ids, logprobs=again.sampling_logprobs, finish=finish))
    await player.play(line)
    return player.rollout(line)


async def run_tree(
    task: Task,
    environment: Environment,
    engine: ForkingEngine,
    chat: Chat,
    *,
    branches: Sequence[int],
    limits: Limits,
    temperature: float = 1.0,
    seed: Sequence[int] = (0,),
    group: int = 0,
) -> list[Rollout]:
    """One task played as a tree: `branches[k]` turns are drawn in every state that k turns lead to, one beyond that.

    A leaf is a rollout. A turn that several share is drawn and answered once; their `nodes` name it alike. Nodes are
    numbered from 0 in the order of the rollouts, which is depth first. The environment starts once and is copied (see
    `Environment`) where the tree branches; a copy that fails is a rollout of its own, with stop `error` and the turns
    up to there. Other failures are as in `run_rollout`: one branch's leave the rest alone.

    Every draw is a function of `seed` and of the path to it. The first child continues its parent's stream, so a tree
    with `branches` (G,) has the very rollouts of a group of G chains.
    """
    check_branches(branches)
    player = _Player(task=task, engine=engine, chat=chat, limits=limits, temperature=temperature, group=group)
    trunk = await player.line(environment, rollout_seed(*seed, 0))
    lines = [trunk]

    def branch_off(line: _Line) -> None:
        """Starts the siblings of the turn that the line is about to take."""
        depth = len(line.turns)
        above = (line.seed, depth) if depth else tuple(seed)
        for child in range(1, branches[depth] if depth < len(branches) else 1):
            sibling = _sibling(line, rollout_seed(*above, child), child)
            lines.append(sibling)
            if sibling.stop is None:
                if depth:
                    engine.fork(line.session, sibling.session)
                running.create_task(player.play(sibling, branch_off))

    try:
        async with asyncio.TaskGroup() as running:
            running.create_task(player.play(trunk, branch_off))
            if trunk.stop is None:
                branch_off(trunk)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    finally:
        for line in lines:  # a fork whose task never began still holds its session
            engine.release(line.session)
            await closed(line.environment)
    return _numbered([(line.path, player.rollout(line)) for line in sorted(lines, key=lambda line: line.path)])


def check_branches(branches: Any) -> None:
    """ConfigError unless `branches` has whole numbers of at least 1, and one of them at least."""
    if not (isinstance(branches, list | tuple) and branches and all(type(n) is int and n >= 1 for n in branches)):
        raise ConfigError(
            f"branches must be whole numbers >= 1, one per turn; got {branches!r}; 4 2 draws four first turns and two "
            "second ones after each"
        )


def _sibling(line: _Line, seed: int, child: int) -> _Line:
    """A line that leaves `line` where it stands, as child number `child` of that state."""
    new = dataclasses.replace(
        line,
        seed=seed,
        turns=list(line.turns),
        states=list(line.states),
        path=(*line.path, child),
        session=object(),
        stop=None,
    )
    try:
        new.environment = forked(line.environment)
    except Exception as failure:
        new.stop, new.error = "error", f"a copy of the environment failed: {described(failure)}"
    return new


def _numbered(leaves: Sequence[tuple[tuple[int, ...], Rollout]]) -> list[Rollout]:
    """The rollouts with their nodes, which are the beginnings of their paths."""
    numbers: dict[tuple[int, ...], int] = {}
    return [
        dataclasses.replace(
            rollout,
            nodes=tuple(numbers.setdefault(path[: k + 1], len(numbers)) for k in range(len(rollout.turns))),
        )
        for path, rollout in leaves
    ]


def sampled_tokens(rollouts: Iterable[Rollout]) -> int:
    """How many tokens the policy sampled in the rollouts of a step, those of shared turns once."""
    return sum(len(turn.action_ids) for turn in turns_once(rollouts))


def turns_once(rollouts: Iterable[Rollout]) -> Iterator[Turn]:
    """The turns of a step's rollouts, those that rollouts share once."""
    seen = set()
    for rollout in rollouts:
        for k, turn in enumerate(rollout.turns):
            node = (rollout.group, rollout.nodes[k]) if rollout.nodes else None
            if node is None or node not in seen:
                yield turn
            seen.add(node)


def reply_room(chat: Chat, limits: Limits, used: int, turns: int) -> int:
    """Most tokens of the reply to a rollout's last turn of `turns`, after which `used` tokens stand.

    What is left out of the context is for the turns still granted, one at least, with empty replies between.
    """
    to_come = max(1, limits.max_turns - turns)
    return limits.context - used - to_come * limits.max_turn_tokens - (to_come - 1) * chat.empty_reply_length


def finite_rewards(rewards: Mapping[str, float]) -> dict[str, float]:
    """An environment's rewards as numbers; ValueError for what is no finite one."""
    found = {name: float(value) for name, value in rewards.items()}
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"an environment's rewards must be finite; got {found}")
    return found


def _turn(completion: Completion, text: str, step: Step, reply: Sequence[int], rewards: Mapping[str, float]) -> Turn:
    return Turn(
        action_ids=completion.token_ids,
        sampling_logprobs=completion.logprobs,
        text=text,
        action=step.action,
        results=step.results,
        reply_ids=tuple(reply),
        rewards=rewards,
    )


def awaited(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, waited for; also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def run_groups(
    tasks: Sequence[Task],
    make_environment: MakeEnvironment,
    engine: Engine,
    chat: Chat,
    *,
    group_size: int,
    limits: Limits,
    temperature: float = 1.0,
    seed: Sequence[int] = (0,),
    first_group: int = 0,
) -> list[list[Rollout]]:
    """`group_size` rollouts of every task, all at once; one list per task. Groups are numbered from `first_group`."""
    environments = [[make_environment(task) for _ in range(group_size)] for task in tasks]
    jobs = [
        run_rollout(
            task,
            environments[group - first_group][member],
            engine,
            chat,
            limits=limits,
            temperature=temperature,
            seed=rollout_seed(*seed, group, member),
            group=group,
        )
        for group, task in enumerate(tasks, start=first_group)
        for member in range(group_size)
    ]
    done = await together(jobs)
    return [done[i : i + group_size] for i in range(0, len(done), group_size)]


async def run_trees(
    tasks: Sequence[Task],
    make_environment: MakeEnvironment,
    engine: ForkingEngine,
    chat: Chat,
    *,
    branches: Sequence[int],
    limits: Limits,
    temperature: float = 1.0,
    seed: Sequence[int] = (0,),
    first_group: int = 0,
) -> list[list[Rollout]]:
    """One tree of every task, all at once; the leaves of each, as `run_tree` gives them, numbered as groups are."""
    return await together(
        [
            run_tree(
                task,
                make_environment(task),
                engine,
                chat,
                branches=branches,
                limits=limits,
                temperature=temperature,
                seed=(*seed, group),
                group=group,
            )
            for group, task in enumerate(tasks, start=first_group)
        ]
    )


async def together(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of jobs that run at once; the first failure ends all of them and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as running:
            started = [running.create_task(job) for job in jobs]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in started]
