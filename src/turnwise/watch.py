"""What goes wrong in training without an error: seen in the metrics so far, said with a remedy.

Pure functions: the metrics of the training steps, in order, to messages. A message comes when its condition begins to
hold, and again only after it has ceased to.
"""

from collections.abc import Callable, Mapping, Sequence

History = Sequence[Mapping[str, float]]
"""The metrics of each training step."""

STEPS = 10
"""Over how many steps a state must last to be spoken of."""
RUNNING = 5
"""Steps of a running mean."""


def new_warnings(history: History, *, max_turns: int, critic_warmup_steps: int = 0) -> list[str]:
    """What the last step makes worth saying."""
    checks: dict[Callable[[History], str | None], History] = {
        _all_truncated: history,
        _abandoned_tool: history,
        _dead_critic: history[critic_warmup_steps:],
    }
    if max_turns >= 3:
        checks[_runaway_turns] = history
    return [said for check, seen in checks.items() if (said := check(seen)) and not check(seen[:-1])]


def _all_truncated(history: History) -> str | None:
    """No rollout of the step ended itself, and none was paid on the way by its environment."""
    if not history or history[-1].get("terminated", 1.0) > 0 or "environment_return" in history[-1]:
        return None
    return (
        "all rollouts of a step were cut off: none gave its answer within its budget, so outcomes teach nothing; raise "
        "--max-turn-tokens or --max-turns, or start from a policy that ends its turns"
    )


def _abandoned_tool(history: History) -> str | None:
    """Tool execution fell below half of its best running mean, and below .2."""
    rates = [metrics["tool_execution"] for metrics in history if "tool_execution" in metrics]
    means = [sum(rates[i : i + RUNNING]) / RUNNING for i in range(len(rates) - RUNNING + 1)]
    if not means or max(means) < 0.1 or means[-1] >= min(0.2, max(means) / 2):
        return None
    return (
        f"the tool is being abandoned: {means[-1]:.0%} of the rollouts of the last {RUNNING} steps executed it, "
        f"{max(means):.0%} at best; pay its turns (turn rewards, with mt-grpo, turn-rloo or mt-ppo), or lower "
        "--learning-rate"
    )


def _dead_critic(history: History) -> str | None:
    """The critic explained nothing for many steps."""
    explained = [metrics["explained_variance"] for metrics in history if "explained_variance" in metrics]
    if len(explained) < STEPS or max(explained[-STEPS:]) > 0:
        return None
    return (
        f"the critic is dead: for {STEPS} steps its values explained none of the returns' variance, so they only add "
        "noise to the advantages; raise --critic-warmup-steps or --value-clip, change --critic-learning-rate, or take "
        "a method without a critic (turn-rloo, mt-grpo)"
    )


def _runaway_turns(history: History) -> str | None:
    """Nearly all rollouts use every turn, while few answers are right and no more than before."""
    if len(history) < 2 * STEPS or "exact_match" not in history[-1]:
        return None
    before, last = history[-2 * STEPS : -STEPS], history[-STEPS:]
    right, rightly_before = (
        sum(metrics.get("exact_match", 0.0) for metrics in part) / STEPS for part in (last, before)
    )
    if min(metrics.get("all_turns", 0.0) for metrics in last) < 0.9 or right > min(0.5, rightly_before):
        return None
    return (
        f"searching runs away: for {STEPS} steps nine of ten rollouts used every turn, while exact match stood at "
        f"{right:.0%}; charge for calls (search_penalty in --reward-weights, or a negative turn reward in "
        "--rewards), or lower --max-turns"
    )
