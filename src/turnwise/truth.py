"""The true advantage of each turn under a policy, by rollouts that are played on from its beginning and its end.

    A(s, a) = Q(s, a) - V(s)

V(s) is the mean return of rollouts that are played on from the state before the turn, with other turns in its place.
Q(s, a) is the mean return of rollouts in which the recorded turn is taken in that state once more, answered anew, and
played on. A return is the undiscounted sum of all turn and outcome rewards, as the run weighs them; what was paid
before the turn is in both, and cancels. What the recorded rollout itself went on to earn is in neither, so that the
truth shares no noise with credit that was made of it.

The state of a saved rollout is made by playing its turns to an environment that has just started, until it answers as
it did then, which one that draws something may do only after some tries.
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from turnwise.chat import Chat
from turnwise.engine import Engine
from turnwise.env import Environment, closed, forked, started, stepped
from turnwise.errors import ConfigError, InputError
from turnwise.rollout import Limits, MakeEnvironment, reply_room, rollout_seed, run_on, together
from turnwise.types import Rollout, Task, Turn

TRIES = 20
"""How often an environment is started anew until it answers as it did in a saved rollout."""

Returns = tuple[float, ...]
Scored = Callable[[Task, Rollout], Rollout]
"""A rollout with its rewards."""


@dataclass(frozen=True, kw_only=True)
class TurnReturns:
    """Returns of the rollouts played on from a turn's two ends; those in which the environment failed are left out."""

    before: Returns
    """From the state before the turn: their mean is V."""
    after: Returns
    """From the turn, taken again: their mean is Q."""


@dataclass(frozen=True, kw_only=True)
class GroupReturns:
    """The returns behind every turn of a group, and what they cost."""

    turns: tuple[tuple[TurnReturns, ...], ...]
    """By rollout and turn."""
    continuations: int
    """How many rollouts were played on."""
    tokens: int
    """How many tokens the policy sampled in them."""
    strayed: int
    """States in which the environment would not answer as it did in the saved rollout; its recorded answer stood."""


def total_return(rollout: Rollout) -> float:
    """The undiscounted sum of all rewards of a scored rollout."""
    return sum(sum(turn.values()) for turn in rollout.turn_rewards) + sum(rollout.outcome_rewards.values())


async def group_returns(
    task: Task,
    rollouts: Sequence[Rollout],
    make_environment: MakeEnvironment,
    engine: Engine,
    chat: Chat,
    *,
    scored: Scored,
    limits: Limits,
    continuations: int,
    temperature: float = 1.0,
    seed: Sequence[int] = (0,),
    group: int = 0,
    forks: bool = True,
) -> GroupReturns:
    """The returns of `continuations` rollouts from each end of every turn of a task's rollouts.

    States that rollouts share are played on from once. Where the environment answers a turn as it did each time, the
    rollouts played on from the turn are those from the next state too. Every draw is a function of `seed`, `group` and
    the tokens before it. `forks` says whether environments can be copied. Raises InputError where the environment does
    not begin as the rollouts did.
    """
    if continuations < 2:
        raise ConfigError(f"continuations must be >= 2, to know how sure their mean is; got {continuations}; give more")
    playing = _Playing(
        task=task,
        make_environment=make_environment,
        engine=engine,
        chat=chat,
        scored=scored,
        limits=limits,
        continuations=continuations,
        temperature=temperature,
        seed=(*seed, group),
        forks=forks,
    )
    turns = await together([playing.of_rollout(rollout) for rollout in rollouts])
    return GroupReturns(
        turns=tuple(turns), continuations=playing.played, tokens=playing.tokens, strayed=playing.strayed
    )


@dataclass(frozen=True, kw_only=True)
class _Played:
    """What rollouts that were played on from one place came to."""

    returns: Returns
    replies: frozenset[tuple[int, ...] | None]
    """How the environment answered the turn that was taken again; None where it ended the rollout."""


@dataclass(kw_only=True)
class _Playing:
    """Playing on from the states of one task's rollouts, from each once."""

    task: Task
    make_environment: MakeEnvironment
    engine: Engine
    chat: Chat
    scored: Scored
    limits: Limits
    continuations: int
    temperature: float
    seed: tuple[int, ...]
    forks: bool
    played: int = 0
    tokens: int = 0
    strayed: int = 0
    known: dict[Hashable, "asyncio.Task[_Played]"] = field(default_factory=dict)

    async def of_rollout(self, rollout: Rollout) -> tuple[TurnReturns, ...]:
        """The returns behind each of a rollout's turns."""
        found = []
        before = await self._from(rollout, 0)
        for k, turn in enumerate(rollout.turns):
            after = await self._from(rollout, k, again=turn)
            found.append(TurnReturns(before=before.returns, after=after.returns))
            if k + 1 < len(rollout.turns):
                before = after if after.replies == {turn.reply_ids} else await self._from(rollout, k + 1)
        return tuple(found)

    async def _from(self, rollout: Rollout, k: int, again: Turn | None = None) -> _Played:
        """Rollouts played on from the state before turn k, or from turn k there; the same ones for equal tokens."""
        ids = list(rollout.prompt_ids)
        for turn in rollout.turns[:k]:
            ids += [*turn.action_ids, *turn.reply_ids]
        key = (again is not None, *ids, *(again.action_ids if again else ()))
        if key not in self.known:
            self.known[key] = asyncio.ensure_future(self._play(rollout, k, again, (len(ids), *map(int, key))))
        return await self.known[key]

    async def _play(self, rollout: Rollout, k: int, again: Turn | None, place: tuple[int, ...]) -> _Played:
        environments = await self._environments(rollout, k)
        done = await together(
            [
                run_on(
                    self.task,
                    environment,
                    self.engine,
                    self.chat,
                    prompt_ids=rollout.prompt_ids,
                    turns=rollout.turns[:k],
                    again=again,
                    limits=self.limits,
                    temperature=self.temperature,
                    seed=rollout_seed(*self.seed, number, *place),
                    group=rollout.group,
                )
                for number, environment in enumerate(environments)
            ]
        )
        self.played += len(done)
        drawn = k + (again is not None)
        self.tokens += sum(len(turn.action_ids) for one in done for turn in one.turns[drawn:])
        whole = [one for one in done if one.stop != "error"]
        return _Played(
            returns=tuple(total_return(self.scored(self.task, one)) for one in whole),
            replies=frozenset(one.turns[k].reply_ids if len(one.turns) > k + 1 else None for one in done),
        )

    async def _environments(self, rollout: Rollout, k: int) -> list[Environment]:
        """Environments in the state before turn k: copies of one, or each played to there."""
        first = await self._at(rollout, k)
        if k and self.forks:
            return [*(forked(first) for _ in range(self.continuations - 1)), first]
        return [first, *[await self._at(rollout, k) for _ in range(self.continuations - 1)]]

    async def _at(self, rollout: Rollout, k: int) -> Environment:
        """An environment that was played the rollout's first k turns, and answered as it did there if it ever does."""
        began = False
        for left in reversed(range(TRIES)):
            environment = self.make_environment(self.task)
            prompt = tuple(self.chat.prompt_ids(await started(environment)))
            if prompt == rollout.prompt_ids:
                began = True
                if await self._answers(environment, rollout.turns[:k], rollout):
                    return environment
            if left or not began:
                await closed(environment)
        if not began:
            raise InputError(
                f"rollouts must begin as their environment does; those of task {self.task.id!r} have a prompt of "
                f"{len(rollout.prompt_ids)} tokens that differs from the environment's own; take the run that they are "
                "of, with its tools, protocol and policy"
            )
        self.strayed += 1
        return environment  # pyright: ignore[reportPossiblyUnboundVariable]

    async def _answers(self, environment: Environment, turns: Sequence[Turn], rollout: Rollout) -> bool:
        """Plays turns; whether each was answered as it was recorded."""
        used = len(rollout.prompt_ids)
        for k, turn in enumerate(turns):
            try:
                step = await stepped(environment, turn.text)
            except Exception:  # a user's environment may fail this time: it did not then
                return False
            used += len(turn.action_ids)
            room = reply_room(self.chat, self.limits, used, k + 1)
            if step.stop or tuple(self.chat.reply_ids(step.reply, max_ids=room)) != turn.reply_ids:
                return False
            used += len(turn.reply_ids)
        return True
