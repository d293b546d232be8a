"""Turn processes: small worlds in which an agent takes turns, and of which everything is known.

An action is written as words, and its words are the tokens that the policy chooses one by one: "search exactly" is a
turn of two tokens. The policy has one logit for each choice, that is for a state and an action's words so far.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from turnwise.credit.parts import check_number
from turnwise.credit.table import LARGEST

States = Float[np.ndarray, "S"]
"""One number per state."""
StateFlags = Bool[np.ndarray, "S"]
Actions = Float[np.ndarray, "S A"]
"""One number per state and action."""
Moves = Float[np.ndarray, "S A S"]
"""One number per state, action and next state."""
Logits = Float[np.ndarray, "P"]
"""One number per choice of the policy."""
Decisions = Int[np.ndarray, "P"]
"""One whole number per choice of the policy."""
Choices = Float[np.ndarray, "S A P"]
"""One number per state, action and choice."""

Move = tuple[float, str, float]
"""Probability, next state, turn reward."""


@dataclass(frozen=True, kw_only=True)
class TurnProcess:
    """A decision process of turns. A rollout ends in a state without actions, or is cut off after `max_turns`."""

    states: tuple[str, ...]
    """The states' names."""
    actions: tuple[tuple[str, ...], ...]
    """The actions of each state, as words; a state without any is terminal."""
    start: States
    """Probability of beginning in each state."""
    transition: Moves
    """Probability of each next state; 0 for actions that a state does not have."""
    turn_reward: Moves
    """Paid at the end of a turn."""
    outcome: States
    """Paid at the end of a rollout, for the state in which it ends or is cut off."""
    max_turns: int
    """How many turns a rollout has at most."""

    def __post_init__(self) -> None:
        check_number("max_turns", self.max_turns, 1, whole=True)
        for name in ("start", "transition", "turn_reward", "outcome"):
            if not np.isfinite(getattr(self, name)).all():
                row = np.argwhere(~np.isfinite(getattr(self, name)))[0].tolist()
                raise ValueError(f"{name} must be finite; entry {row} is not")
        self._check_start()
        for s, actions in enumerate(self.actions):
            self._check_words(s, actions)
            self._check_moves(s, len(actions))

    def _check_start(self) -> None:
        if (self.start < 0).any() or not np.isclose(self.start.sum(), 1.0, rtol=0, atol=1e-12):
            raise ValueError(f"start must be probabilities that sum to 1; got {self.start.tolist()}")
        ended = np.flatnonzero((self.start > 0) & self.terminal)
        if len(ended):
            raise ValueError(f"a rollout must not begin in a terminal state; {self.states[ended[0]]!r} has no actions")

    def _check_words(self, state: int, actions: Sequence[str]) -> None:
        words = [tuple(action.split()) for action in actions]
        for i, own in enumerate(words):
            for j, other in enumerate(words):
                if i != j and other[: len(own)] == own:
                    raise ValueError(
                        f"an action must not begin another one of its state; in {self.states[state]!r}, "
                        f"{actions[i]!r} begins {actions[j]!r}"
                    )
            if not own:
                raise ValueError(f"an action must have a word at least; action {i} of {self.states[state]!r} has none")

    def _check_moves(self, state: int, actions: int) -> None:
        wanted = np.arange(self.transition.shape[1]) < actions
        sums = self.transition[state].sum(-1)
        wrong = np.flatnonzero((self.transition[state] < 0).any(-1) | ~np.isclose(sums, wanted, rtol=0, atol=1e-12))
        if len(wrong):
            a = int(wrong[0])
            name = self.actions[state][a] if a < actions else f"action {a}, which does not exist,"
            raise ValueError(
                f"transition must be probabilities that sum to {int(wanted[a])}; those of {name!r} in "
                f"{self.states[state]!r} are {self.transition[state, a].tolist()}"
            )

    @property
    def terminal(self) -> StateFlags:
        """Which states end a rollout."""
        return np.array([len(actions) == 0 for actions in self.actions])

    @cached_property
    def choices(self) -> tuple[tuple[int, str], ...]:
        """What the policy has a logit for: a state, and an action's words up to the chosen one."""
        found: dict[tuple[int, str], None] = {}
        for s, actions in enumerate(self.actions):
            for action in actions:
                found |= dict.fromkeys((s, words) for words in _beginnings(action))
        return tuple(found)

    @cached_property
    def decision(self) -> Decisions:
        """Choices with equal numbers are the alternatives of one decision: a state and the words before."""
        numbers: dict[tuple[int, str], int] = {}
        before = [(s, words.rpartition(" ")[0]) for s, words in self.choices]
        return np.array([numbers.setdefault(each, len(numbers)) for each in before], dtype=np.int64)

    @cached_property
    def through(self) -> Choices:
        """1 where an action makes a choice, 0 elsewhere."""
        place = {choice: p for p, choice in enumerate(self.choices)}
        out = np.zeros((*self.transition.shape[:2], len(place)))
        for s, actions in enumerate(self.actions):
            for a, action in enumerate(actions):
                out[s, a, [place[s, words] for words in _beginnings(action)]] = 1.0
        return out


def _beginnings(action: str) -> list[str]:
    words = action.split()
    return [" ".join(words[: j + 1]) for j in range(len(words))]


def turn_process(
    start: Mapping[str, float],
    moves: Mapping[str, Mapping[str, Sequence[Move]]],
    outcomes: Mapping[str, float],
    *,
    max_turns: int,
) -> TurnProcess:
    """The process of named states.

    `moves` has, for each state that is not terminal, its actions and where each may lead: (probability, next state,
    turn reward). `outcomes` are by state; a state that is not named there pays 0 at the end.
    Raises ValueError for names that no move leads to, and for two moves of one action to one state.
    """
    reached = [next_state for by_action in moves.values() for found in by_action.values() for _, next_state, _ in found]
    states = tuple(dict.fromkeys([*moves, *reached]))
    for name in (*start, *outcomes):
        if name not in states:
            raise ValueError(f"start and outcomes must name states that moves name, {list(states)}; got {name!r}")
    number = {name: s for s, name in enumerate(states)}
    actions = tuple(tuple(moves.get(name, {})) for name in states)
    shape = (len(states), max(1, *map(len, actions)), len(states))
    transition, turn_reward = np.zeros(shape), np.zeros(shape)
    for state, by_action in moves.items():
        for a, (action, found) in enumerate(by_action.items()):
            to = [number[next_state] for _, next_state, _ in found]
            if len(set(to)) < len(to):
                raise ValueError(f"an action must lead to a state in one move; {action!r} in {state!r} has two")
            transition[number[state], a, to] = [probability for probability, _, _ in found]
            turn_reward[number[state], a, to] = [reward for _, _, reward in found]
    return TurnProcess(
        states=states,
        actions=actions,
        start=np.array([start.get(name, 0.0) for name in states], dtype=float),
        transition=transition,
        turn_reward=turn_reward,
        outcome=np.array([outcomes.get(name, 0.0) for name in states], dtype=float),
        max_turns=max_turns,
    )


def logit_table(process: TurnProcess, logits: Mapping[str, Mapping[str, float]]) -> Logits:
    """The policy's logits by state and by an action's words up to the chosen one; 0 where not named."""
    place = {choice: p for p, choice in enumerate(process.choices)}
    out = np.zeros(len(place))
    for state, by_words in logits.items():
        for words, logit in by_words.items():
            choice = (process.states.index(state) if state in process.states else -1, words)
            if choice not in place:
                raise ValueError(f"logits must name the choices of a state; {state!r} has no choice {words!r}")
            out[place[choice]] = logit
    return out


def choice_probabilities(process: TurnProcess, logits: Logits) -> Logits:
    """The probability of each choice at its decision.

    p = exp(logit) / Σ exp(logit)   over the choices of one decision
    """
    return np.exp(choice_log_probabilities(process, logits))


def choice_log_probabilities(process: TurnProcess, logits: Logits) -> Logits:
    """Their logarithms, which are finite also where the probability is too small for a number."""
    if len(logits) != len(process.choices) or not (np.abs(logits) <= LARGEST).all():
        raise ValueError(
            f"logits must be {len(process.choices)} finite numbers within ±{LARGEST:g}, one per choice; got "
            f"{logits.tolist()}"
        )
    highest = np.full(int(process.decision.max()) + 1, -np.inf)
    np.maximum.at(highest, process.decision, logits)
    centred = logits - highest[process.decision]
    return centred - np.log(np.bincount(process.decision, weights=np.exp(centred)))[process.decision]


def action_probabilities(process: TurnProcess, logits: Logits) -> Actions:
    """The probability of each action in each state: the product over its tokens; 0 where there is no such action."""
    return np.where(process.through.any(-1), np.exp(action_log_probabilities(process, logits)), 0.0)


def action_log_probabilities(process: TurnProcess, logits: Logits) -> Actions:
    """The sum over each action's tokens; 0 where there is no such action."""
    return process.through @ choice_log_probabilities(process, logits)


def action_scores(process: TurnProcess, logits: Logits) -> Choices:
    """The gradient of each action's log-probability by the logits.

    ∂ log π(a|s) / ∂ logit_p = [a chooses p] − [a comes to p's decision] · probability of p
    """
    alternatives = process.decision[:, None] == process.decision
    return process.through - (process.through @ alternatives) * choice_probabilities(process, logits)
