"""What goes wrong in training without an error: seen in the metrics so far, said with a remedy.

Pure functions: the metrics of the training steps, in order, to messages. A message comes when its condition begins to
hold, and again only after it has ceased to. What one step shows is said after one, what could be chance in one step
after three or five; docs/diagnostics.md has all conditions in one table.
"""

from collections.abc import Callable, Mapping, Sequence

History = Sequence[Mapping[str, float]]
"""The metrics of each training step."""
Check = Callable[[History], str | None]

FEW = 3
"""Steps of a mean in which chance is small."""
SOME = 5
"""Over how many steps a state must last that healthy runs pass through."""
MANY = 6
"""The same for a critic, which explains nothing for up to four steps in healthy runs."""
SOLVED = 0.5
"""From this share of right answers on, certainty and equal rewards are success."""
JUDGED_BY = ("exact_match", "success")


def new_warnings(
    history: History,
    *,
    max_turns: int,
    critic_warmup_steps: int = 0,
    weights: Mapping[str, float] | None = None,
) -> list[str]:
    """What the last step makes worth saying. `weights` are those of the reward components."""
    weights = weights or {}
    checks: dict[Check, History] = {
        _all_truncated: history,
        _unpaid_truncation: history,
        _abandoned_tool: history,
        _dead_groups: history,
        lambda seen: _reward_never_arrives(seen, weights): history,
        _constant_reward: history,
        _short_turns: history,
        _certain_too_early: history[critic_warmup_steps:],
        _flipped_signs: history[critic_warmup_steps:],
        _token_drift: history,
        _off_policy: history,
        _judge_of_one_mind: history,
        _dead_critic: history[critic_warmup_steps:],
        _harmful_critic: history[critic_warmup_steps:],
    }
    if max_turns >= 3:
        checks[_runaway_turns] = history
    return [said for check, seen in checks.items() if (said := check(seen)) and not check(seen[:-1])]


def _mean(history: History, name: str, steps: int, *, first: bool = False) -> float | None:
    """A metric's mean over the last steps that have it, or over the first ones; None with fewer."""
    values = [metrics[name] for metrics in history if name in metrics]
    if len(values) < steps:
        return None
    return sum(values[:steps] if first else values[-steps:]) / steps


def _is_solved(history: History) -> bool:
    """Whether the policy does well: by what is right, where that is known, else by its return, against its start's."""
    for name in JUDGED_BY:
        right = _mean(history, name, FEW)
        if right is not None:
            return right >= SOLVED
    now, start = _mean(history, "return", FEW), _mean(history, "return", FEW, first=True)
    return now is not None and start is not None and now > start


# --- what is played -------------------------------------------------------------------------------


def _all_truncated(history: History) -> str | None:
    """No rollout of the step ended itself, and none was paid on the way by its environment."""
    if not history or history[-1].get("terminated", 1.0) > 0 or "environment_return" in history[-1]:
        return None
    return (
        "all rollouts of a step were cut off: none gave its answer within its budget, so outcomes teach nothing; raise "
        "--max-turn-tokens or --max-turns, or start from a policy that ends its turns"
    )


def _unpaid_truncation(history: History) -> str | None:
    """More than half of the rollouts were cut off and their outcome paid nothing; where all are, that is said alone."""
    share = _mean(history, "cut_unpaid", FEW)
    if share is None or share <= 0.5 or _all_truncated(history) or "environment_return" in history[-1]:
        return None
    return (
        f"truncation takes the rewards: {share:.0%} of the rollouts of the last {FEW} steps were cut off by a budget "
        "and their outcome paid nothing, so length is punished and not what was done; raise --max-turn-tokens or "
        "--max-turns, or let turns pay, by rewards and a method of turns (mt-grpo, turn-rloo or mt-ppo)"
    )


def _abandoned_tool(history: History) -> str | None:
    """Tool execution fell below half of its best running mean, and below .2."""
    rates = [metrics["tool_execution"] for metrics in history if "tool_execution" in metrics]
    means = [sum(rates[i : i + FEW]) / FEW for i in range(len(rates) - FEW + 1)]
    if not means or max(means) < 0.1 or means[-1] >= min(0.2, max(means) / 2):
        return None
    return (
        f"the tool is being abandoned: {means[-1]:.0%} of the rollouts of the last {FEW} steps executed it, "
        f"{max(means):.0%} at best; let its turns pay (--reward-weights: rewards of turns up, prices of searches and "
        "formats down), take a method of turns if this is none (mt-grpo, turn-rloo or mt-ppo), or lower --learning-rate"
    )


def _runaway_turns(history: History) -> str | None:
    """Nearly all rollouts use every turn, while few answers are right and no more than before."""
    if len(history) < 2 * SOME or "exact_match" not in history[-1]:
        return None
    before, last = history[-2 * SOME : -SOME], history[-SOME:]
    right, rightly_before = (sum(metrics.get("exact_match", 0.0) for metrics in part) / SOME for part in (last, before))
    if min(metrics.get("all_turns", 0.0) for metrics in last) < 0.9 or right > min(SOLVED, rightly_before):
        return None
    return (
        f"searching runs away: for {SOME} steps nine of ten rollouts used every turn, while exact match stood at "
        f"{right:.0%}; charge for calls (search_penalty in --reward-weights, or a negative turn reward in "
        "--rewards), or lower --max-turns"
    )


def _short_turns(history: History) -> str | None:
    """Turns are less than a third as long as at first, while little is right."""
    start, now = _mean(history, "turn_tokens", FEW, first=True), _mean(history, "turn_tokens", FEW)
    if start is None or now is None or now >= start / 3 or _is_solved(history):
        return None
    return (
        f"turns collapse in length: {now:.0f} sampled tokens on average in the last {FEW} steps, {start:.0f} at first; "
        "look at rollouts (turnwise report); give --aggregation constant, which does not favour short turns, a "
        "--kl-coef, or a lower --learning-rate"
    )


# --- what is paid ---------------------------------------------------------------------------------


def _dead_groups(history: History) -> str | None:
    """Nearly all groups have no credit, while little is right."""
    share = _mean(history, "dead_groups", FEW)
    if share is None or share < 0.8 or _is_solved(history):
        return None
    return (
        f"groups are dead: in {share:.0%} of those of the last {FEW} steps all rollouts earned the same, so that "
        "nothing is learned from them; give --dynamic-sampling 2, a larger --group-size, easier questions, or rewards "
        "that tell rollouts apart"
    )


def _reward_never_arrives(history: History, weights: Mapping[str, float]) -> str | None:
    """A reward that is to be earned was 0, or absent, in every rollout from the first step on."""
    if len(history) < SOME:
        return None
    names = [n for n, w in weights.items() if w > 0 and not any(metrics.get(f"reward/{n}") for metrics in history)]
    if not names:
        return None
    return (
        f"rewards never arrive: no rollout has earned {' or '.join(names)} since the first step; check that it can be "
        "earned (turnwise inspect shows prompts and results), begin with easier questions or a start that earns it at "
        "times, or leave it out of --reward-weights"
    )


def _constant_reward(history: History) -> str | None:
    """A reward component was the same number, not 0, in the mean of every step from the first one on."""
    if len(history) < SOME:
        return None
    names = [n for n in history[0] if n.startswith("reward/") and history[0][n]]
    same = [n for n in names if all(abs(metrics.get(n, 0.0) - history[0][n]) < 1e-9 for metrics in history)]
    if not same:
        return None
    return (
        f"a reward is constant: {' and '.join(n.removeprefix('reward/') for n in same)} paid every rollout alike since "
        "the first step, which tells none from another; leave it out of --reward-weights, or make it harder to earn"
    )


def _judge_of_one_mind(history: History) -> str | None:
    """The judge says the same of nearly every answer, right or not, or of every turn."""
    passed, right = _mean(history, "judge/approved", FEW), _mean(history, "exact_match", FEW)
    spread = _mean(history, "judge/turn_spread", FEW)
    if passed is not None and right is not None and abs(passed - 0.5) >= 0.48 and abs(passed - right) > 0.2:
        what = f"approved {passed:.0%} of the answers, of which {right:.0%} match exactly"
    elif spread is not None and spread < 0.01:
        what = "gave every turn the same score"
    else:
        return None
    return (
        f"the judge is of one mind: in the last {FEW} steps it {what}; its reward teaches nothing then, or to please "
        "it; sharpen --judge-outcome-rubric or --judge-rubric, or take another --judge-model"
    )


# --- what is learned ------------------------------------------------------------------------------


def _certain_too_early(history: History) -> str | None:
    """Entropy is less than a sixth of the first steps', while little is right."""
    start, now = _mean(history, "entropy", FEW, first=True), _mean(history, "entropy", FEW)
    if start is None or now is None or now >= start / 6 or _is_solved(history):
        return None
    return (
        f"entropy collapses: {now:.3f} nats a token in the last {FEW} steps, {start:.3f} at first, while few answers "
        "are right: nothing new is tried any more; lower --learning-rate, raise --clip-high (.28) or --temperature, or "
        "give a --kl-coef"
    )


def _flipped_signs(history: History) -> str | None:
    """Most turns that earned more than others at their place are punished, or the other way round."""
    share = _mean(history, "sign_flips", FEW)
    if share is None or share <= 0.6:
        return None
    return (
        f"credit contradicts turn rewards: {share:.0%} of the turns of the last {FEW} steps that earned more or less "
        "than others at their place have an advantage of the opposite sign; take a method of turns if this is none "
        "(--estimator mt-grpo, turn-rloo or mt-ppo), or rewards of turns that serve the outcome"
    )


def _token_drift(history: History) -> str | None:
    """Before any update of the step, the trainer gives the sampled tokens other probabilities than the sampler."""
    gap = history[-1].get("sampler_kl", history[-1].get("sampler_gap", 0.0)) if history else 0.0
    if gap <= 0.02 or history[-1].get("updates_behind"):  # an update is between them
        return None
    return (
        f"sampler and trainer disagree: {gap:.3f} nats a token apart before the step's first update, where the same "
        "weights should agree; if it came at once, tokens, masks, template or temperature differ between the two; with "
        "--engine vllm give --sampler-correction truncate, or --dtype float32"
    )


def _off_policy(history: History) -> str | None:
    """Within a step, the policy goes far from the one that sampled."""
    shift, clipped = _mean(history, "policy_shift", FEW), _mean(history, "clip_fraction", FEW)
    if shift is None or clipped is None or (shift <= 0.1 and clipped <= 0.3):
        return None
    return (
        f"updates go off policy: {shift:.3f} nats a token from the policy that sampled, {clipped:.0%} of the tokens "
        f"clipped, means of the last {FEW} steps; lower --learning-rate, --passes or --minibatches"
    )


def _dead_critic(history: History) -> str | None:
    """The critic explained nothing for many steps."""
    explained = [metrics["explained_variance"] for metrics in history if "explained_variance" in metrics]
    if len(explained) < MANY or max(explained[-MANY:]) > 0:
        return None
    return (
        f"the critic is dead: for {MANY} steps its values explained none of the returns' variance, so they only add "
        "noise to the advantages; raise --critic-warmup-steps or --value-clip, change --critic-learning-rate, or take "
        "a method without a critic (turn-rloo, mt-grpo)"
    )


def _harmful_critic(history: History) -> str | None:
    """The critic's values are further from the returns than no values would be, by half of the returns' variance."""
    explained = _mean(history, "explained_variance", FEW)
    if explained is None or explained > -0.5:
        return None
    return (
        f"the critic does harm: explained variance {explained:.1f} in the last {FEW} steps, below that of no critic; "
        "lower --critic-learning-rate, raise --critic-warmup-steps, or take a method without a critic (turn-rloo, "
        "mt-grpo)"
    )
