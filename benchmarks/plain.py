"""A training step as one writes it with transformers alone: `generate` for every turn, padded rows for the loss.

Every turn is one left-padded batch of whole conversations, all rollouts of a step together. The update is one padded
batch, with logits of everything after the prompts, and the plain clipped loss.
"""

from collections.abc import Sequence

import torch

from turnwise.crediting import credit_rollouts
from turnwise.env import Step
from turnwise.policy import Policy
from turnwise.setting import Setting
from turnwise.types import Action, Rollout, Task, Turn


def plain_rollouts(policy: Policy, setting: Setting, size: int) -> list[Rollout]:
    """A group of `size` rollouts of each question, drawn with `model.generate`; not scored."""
    tasks = [task for task in setting.train for _ in range(size)]
    environments = [setting.environment(task) for task in tasks]
    prompts = [policy.chat.prompt_ids(environment.start()) for environment in environments]  # type: ignore[arg-type]
    turns: list[list[Turn]] = [[] for _ in tasks]
    for _ in range(setting.config.max_turns):
        said = [[*prompt, *_tokens(own)] for prompt, own in zip(prompts, turns, strict=True)]
        for own, environment, ids in zip(turns, environments, _generated(policy, setting, said), strict=True):
            text = policy.chat.decode(ids)
            step: Step = environment.step(text)  # type: ignore[assignment]
            reply = tuple(policy.chat.reply_ids(step.reply))
            own.append(_turn(tuple(ids), text, reply))
    return [
        Rollout(task_id=task.id, group=i // size, prompt_ids=tuple(prompt), turns=tuple(own), stop="max_turns")
        for i, (task, prompt, own) in enumerate(zip(tasks, prompts, turns, strict=True))
    ]


def _turn(ids: tuple[int, ...], text: str, reply: tuple[int, ...]) -> Turn:
    zeros = (0.0,) * len(ids)
    return Turn(action_ids=ids, sampling_logprobs=zeros, text=text, action=Action(), results=(), reply_ids=reply)


def _tokens(turns: Sequence[Turn]) -> list[int]:
    return [token for turn in turns for token in (*turn.action_ids, *turn.reply_ids)]


def _generated(policy: Policy, setting: Setting, prompts: Sequence[list[int]]) -> list[list[int]]:
    """What the policy says next in each conversation, up to the first stop token."""
    width, pad = max(map(len, prompts)), policy.chat.pad_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = policy.model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=setting.config.max_turn_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(policy.chat.stop_ids),
    )
    return [_until_stop(row, policy) for row in output[:, width:].tolist()]


def _until_stop(ids: list[int], policy: Policy) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in policy.chat.stop_ids]
    return ids[: ends[0] + 1] if ends else ids


def plain_update(
    policy: Policy, optimizer: torch.optim.Optimizer, setting: Setting, rollouts: Sequence[Rollout]
) -> None:
    """Scores, the same credit, and one optimiser step over one padded batch."""
    tasks: list[Task] = [task for task in setting.train for _ in range(len(rollouts) // len(setting.train))]
    scored = [setting.scored(task, rollout) for task, rollout in zip(tasks, rollouts, strict=True)]
    rows = [row for _, row in credit_rollouts(scored, setting.config).rows]
    pad = policy.chat.pad_id
    before, after = max(len(row.prompt_ids) for row in rows), max(len(row.ids) for row in rows)
    ids, mask, advantages, counted = [], [], [], []
    for row in rows:
        left, right = before - len(row.prompt_ids), after - len(row.ids)
        ids.append([pad] * left + [*row.prompt_ids, *row.ids] + [pad] * right)
        mask.append([0] * left + [1] * (len(row.prompt_ids) + len(row.ids)) + [0] * right)
        advantages.append([*row.advantages, *[0.0] * right])
        counted.append([*row.loss, *[False] * right])
    ids = torch.tensor(ids)
    logits = policy.model(input_ids=ids, attention_mask=torch.tensor(mask), logits_to_keep=after + 1).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, -after:, None])[..., 0]
    ratio = (logprobs - logprobs.detach()).exp()
    config, advantage, where = setting.config, torch.tensor(advantages), torch.tensor(counted)
    terms = torch.minimum(ratio * advantage, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage)
    loss = -((terms * where).sum(1) / where.sum(1)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
