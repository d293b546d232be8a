"""Named problems, each with a policy to look at, chosen to be neither uniform nor sure."""

from collections.abc import Callable

from turnwise.credit.parts import check_number, check_unit
from turnwise.credit.table import LARGEST
from turnwise.lab.process import Logits, Move, TurnProcess, logit_table, turn_process

Problem = tuple[TurnProcess, Logits]
"""A process, and the policy at which it is looked at."""


def stop_or_go(*, turns: int = 3, noise: float = 0.2) -> Problem:
    """The agent searches until it stops to answer; a search finds with probability 1 − `noise`.

    The search that finds pays 0.4, any other costs 0.1. The answer is worth 1 after a find and 0.2 before it; who is
    cut off after `turns` turns gets 0.
    """
    check_number("turns", turns, 1, whole=True)
    check_unit(noise=noise)
    process = turn_process(
        {"nothing": 1.0},
        {
            "nothing": {
                "search": [(1 - noise, "found", 0.4), (noise, "nothing", -0.1)],
                "answer": [(1.0, "guessed", 0.0)],
            },
            "found": {"search": [(1.0, "found", -0.1)], "answer": [(1.0, "told", 0.0)]},
        },
        {"guessed": 0.2, "told": 1.0},
        max_turns=turns,
    )
    return process, logit_table(process, {"nothing": {"search": -0.3}, "found": {"search": 0.4}})


def ragged(*, turns: int = 3, ends: float = 0.3) -> Problem:
    """The world ends the rollout after any turn with probability `ends`, whatever the agent does.

    Working well pays 0.3 and leaves the work in order: worth 1 at the end, half of that where it is cut off.
    """
    check_number("turns", turns, 1, whole=True)
    check_unit(ends=ends)

    def after(state: str, reward: float) -> list[Move]:
        return [(1 - ends, state, reward), (ends, f"left {state}", reward)]

    moves = {"well": after("in order", 0.3), "badly": after("in a mess", 0.0)}
    process = turn_process(
        {"in a mess": 1.0},
        {"in a mess": moves, "in order": moves},
        {"left in order": 1.0, "in order": 0.5},
        max_turns=turns,
    )
    return process, logit_table(process, {"in a mess": {"well": -0.4}, "in order": {"well": 0.3}})


def stochastic_tool(*, noise: float = 0.2) -> Problem:
    """One call and one answer, with a tool that is wrong with probability `noise`.

    A precise query brings evidence unless the tool is wrong, a vague one only if it is; evidence pays 0.5. Reading
    evidence is right, reading anything else is not, and guessing is right in three of ten.
    """
    check_unit(noise=noise)
    guess: list[Move] = [(0.3, "right", 0.0), (0.7, "wrong", 0.0)]
    process = turn_process(
        {"question": 1.0},
        {
            "question": {
                "precise": [(1 - noise, "evidence", 0.5), (noise, "nonsense", 0.0)],
                "vague": [(noise, "evidence", 0.5), (1 - noise, "nonsense", 0.0)],
            },
            "evidence": {"read": [(1.0, "right", 0.0)], "guess": guess},
            "nonsense": {"read": [(1.0, "wrong", 0.0)], "guess": guess},
        },
        {"right": 1.0},
        max_turns=2,
    )
    return process, logit_table(process, {"question": {"precise": -0.2}, "evidence": {"read": 0.3}})


def revisits(*, turns: int = 4) -> Problem:
    """A corridor of three rooms: going back, or against the wall, visits a room again. Each step costs 0.1.

    The outcome is 1 behind the third room, and 0 for who is not there after `turns` turns.
    """
    check_number("turns", turns, 1, whole=True)
    process = turn_process(
        {"room 1": 1.0},
        {
            "room 1": {"back": [(1.0, "room 1", -0.1)], "on": [(1.0, "room 2", -0.1)]},
            "room 2": {"back": [(1.0, "room 1", -0.1)], "on": [(1.0, "room 3", -0.1)]},
            "room 3": {"back": [(1.0, "room 2", -0.1)], "on": [(1.0, "out", -0.1)]},
        },
        {"out": 1.0},
        max_turns=turns,
    )
    return process, logit_table(process, {"room 1": {"on": 0.5}, "room 2": {"on": 0.2}, "room 3": {"on": -0.2}})


def tokens() -> Problem:
    """Turns of one to three tokens: whether to search is the first, how exactly the second.

    An exact search finds in nine of ten and a loose one in three of ten; a find pays 0.5.
    """
    process = turn_process(
        {"question": 1.0},
        {
            "question": {
                "search exactly": [(0.9, "found", 0.5), (0.1, "lost", 0.0)],
                "search loosely": [(0.3, "found", 0.5), (0.7, "lost", 0.0)],
                "guess": [(1.0, "guessed", 0.0)],
            },
            "found": {"answer short": [(1.0, "right", 0.0)], "answer at length": [(1.0, "half right", 0.0)]},
            "lost": {"answer short": [(1.0, "wrong", 0.0)], "guess": [(1.0, "guessed", 0.0)]},
        },
        {"right": 1.0, "half right": 0.5, "guessed": 0.3},
        max_turns=2,
    )
    return process, logit_table(process, {"question": {"search": 0.2, "search exactly": -0.4}})


def decoy() -> Problem:
    """The first turn's reward and the outcome disagree: the shiny call pays 0.5 and costs more later."""
    process = turn_process(
        {"question": 1.0},
        {
            "question": {"shiny": [(1.0, "astray", 0.5)], "plain": [(1.0, "on track", 0.0)]},
            "astray": {"this": [(1.0, "barely right", 0.0)], "that": [(1.0, "wrong", 0.0)]},
            "on track": {"this": [(1.0, "right", 0.0)], "that": [(0.5, "right", 0.0), (0.5, "wrong", 0.0)]},
        },
        {"right": 1.0, "barely right": 0.2},
        max_turns=2,
    )
    return process, logit_table(
        process, {"question": {"shiny": 0.4}, "astray": {"this": 0.2}, "on track": {"this": 0.1}}
    )


def one_decisive_turn(*, turns: int = 4, reward: float = 0.5) -> Problem:
    """Of `turns` turns only the one in the middle matters: it decides the outcome, and pays `reward` if right."""
    check_number("turns", turns, 1, whole=True)
    check_number("reward", reward, -LARGEST)
    decisive = (turns + 1) // 2
    moves: dict[str, dict[str, list[Move]]] = {}
    for k in range(1, turns + 1):
        here = [f"turn {k}"] if k <= decisive else [f"turn {k}, won", f"turn {k}, lost"]
        for state in here:
            ends = ("won", "lost") if k == decisive else (state.partition(", ")[2],) * 2
            left, right = (end if k == turns else f"turn {k + 1}{', ' * (k >= decisive)}{end}" for end in ends)
            paid = reward if k == decisive else 0.0
            moves[state] = {"left": [(1.0, left, paid)], "right": [(1.0, right, 0.0)]}
    process = turn_process({"turn 1": 1.0}, moves, {"won": 1.0}, max_turns=turns)
    return process, logit_table(process, {state: {"left": -0.3} for state in moves})


def sparse(*, turns: int = 3, paying: int = 0) -> Problem:
    """The outcome is 1 where every turn was right, and 0 otherwise; the first `paying` right turns pay 1 / `turns`."""
    check_number("turns", turns, 1, whole=True)
    check_number("paying", paying, 0, turns, whole=True)
    moves: dict[str, dict[str, list[Move]]] = {}
    for k in range(1, turns + 1):
        for state in ("clean", "spoiled") if k > 1 else ("clean",):
            right = state if k == turns else f"turn {k + 1}, {state}"
            wrong = "spoiled" if k == turns else f"turn {k + 1}, spoiled"
            paid = 1 / turns if k <= paying else 0.0
            moves[f"turn {k}, {state}"] = {"right": [(1.0, right, paid)], "wrong": [(1.0, wrong, 0.0)]}
    process = turn_process({"turn 1, clean": 1.0}, moves, {"clean": 1.0}, max_turns=turns)
    return process, logit_table(process, {state: {"right": 0.2} for state in moves})


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "stop-or-go": stop_or_go,
    "ragged": ragged,
    "stochastic-tool": stochastic_tool,
    "revisits": revisits,
    "tokens": tokens,
    "decoy": decoy,
    "one-decisive-turn": one_decisive_turn,
    "sparse": sparse,
}
