"""Warm start on a user's own demonstrations: maximum likelihood of what the assistant says in them.

A file has one conversation a line, in the shape of OpenAI's API (`messages`, and `tools` where it has any), or as a
`question` and its `turns`: what the policy says and what is said to it, by turns. The frame, the question, and what
tools return are read, never learned.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turnwise.batch import Row
from turnwise.chat import Chat
from turnwise.config import MICRO_BATCH_TOKENS, TrainConfig
from turnwise.conversations import read_messages, read_tools, written
from turnwise.devices import Device, Dtype, check_device
from turnwise.errors import ConfigError, InputError, TurnwiseError
from turnwise.evaluation import place
from turnwise.policy import Policy, save_policy
from turnwise.protocols import ProtocolName, TagProtocol, opening, protocol_named, said_text
from turnwise.records import parsed
from turnwise.setting import make_tools, played_protocol
from turnwise.tools import Tool
from turnwise.training import start_policy
from turnwise.types import Message
from turnwise.warmup import teach_rows

RISE = 0.1
"""The share of the steps in which the learning rate rises; then it falls in a straight line."""
LAST_RATE = 0.05
"""The last step's learning rate, as a share of the peak."""


@dataclass(frozen=True, kw_only=True)
class DemonstrationConfig:
    """What to learn from a file of demonstrations."""

    demonstrations: Path
    """JSON lines of conversations: messages with tool calls and results, or question and turns (docs/formats.md)."""
    out: Path = Path("runs/warmup")
    """Folder of the checkpoint to make."""
    policy: str = "embedded"
    """The policy that learns: "embedded" (the one for the protocol), or a checkpoint folder."""
    protocol: ProtocolName = "tools"
    """The format in which calls and results are written: "tools", "search", or "native", the policy's own."""
    tools: str | None = None
    """The tools that a question's rules tell of, as `train` names them; by default the search tool."""
    corpus: str = "atlas"
    """What that search tool searches."""
    seed: int = 0
    """Decides the order."""
    epochs: int = 3
    """How often each demonstration is learned."""
    rows: int = 8
    """Demonstrations in a step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; large models want 1e-5 or so."""
    token_budget: int | None = None
    """End once so many tokens have been read, if `epochs` do not end it before."""
    device: Device = "auto"
    """Where it is learned, as in training: "auto", "cpu", "cuda" or "mps"."""
    dtype: Dtype = "float32"
    """Of the weights and the arithmetic, as in training: "float32", "bfloat16" or "mixed"."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what it made."""

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("rows", 1), ("token_budget", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name.replace('_', '-')} must be >= {low}; got {value}; give a larger number")
        if not 0 < self.learning_rate <= 1:
            raise ConfigError(f"learning-rate must be in (0, 1]; got {self.learning_rate}; 1e-5 suits large models")


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One conversation, and the line of its file."""

    line: int
    messages: tuple[Message, ...]
    tools: Mapping[str, Tool]


# ------------------------------------------------------------------------------------- reading


def read_demonstrations(path: Path, protocol: TagProtocol, tools: Mapping[str, Tool]) -> list[Demonstration]:
    """The demonstrations of a file; a `question` alone gets the protocol's rules, which tell of `tools`.

    InputError, with the line's number, where one is not a conversation that ends with what the assistant says.
    """
    found = [_demonstration(data, number, path, protocol, tools) for number, data in _lines(path)]
    if not found:
        raise InputError(f"{path} must have one demonstration at least; it is empty; write one a line")
    return found


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"the demonstrations must be a file; {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be a text file; it cannot be read ({error}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parsed(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: must be JSON; {error}; write one object a line") from error


def _demonstration(
    data: Any, number: int, path: Path, protocol: TagProtocol, tools: Mapping[str, Tool]
) -> Demonstration:
    try:
        if not isinstance(data, dict) or ("messages" in data) == ("question" in data):
            raise InputError("must be an object with messages, or with question and turns; correct it")
        if "question" in data:
            messages = [*opening(protocol, tools, _text(data, "question")), *_turns(data.get("turns"))]
            own: Mapping[str, Tool] = tools if protocol.own_format else {}
        else:
            messages, own = read_messages(data["messages"]), read_tools(data.get("tools"))
        _check_roles(messages)
    except InputError as error:
        raise InputError(f"{path}, line {number}: {error}") from error
    return Demonstration(line=number, messages=tuple(messages), tools=own)


def _text(data: Mapping[str, Any], name: str) -> str:
    if not isinstance(data[name], str) or not data[name].strip():
        raise InputError(f"{name} must be a text; got {data[name]!r}; write one")
    return data[name]


def _turns(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise InputError(f"turns must be a list of texts, the policy's first; got {str(turns)[:60]}; correct it")
    return [Message(role="user" if k % 2 else "assistant", content=turn) for k, turn in enumerate(turns)]


def _check_roles(messages: Sequence[Message]) -> None:
    """InputError unless the assistant is spoken to first, answers each time with one message, and has the last word."""
    roles = [message.role for message in messages]
    if roles[0] == "assistant" or roles[-1] != "assistant":
        raise InputError(f"must begin with another's message and end with the assistant's; got {', '.join(roles)}")
    for number, pair in enumerate(itertools.pairwise(roles)):
        if pair == ("assistant", "assistant"):
            raise InputError(f"messages {number} and {number + 1} must not both be the assistant's; join them")


# ---------------------------------------------------------------------------------------- rows


def demonstration_row(demonstration: Demonstration, chat: Chat, protocol: TagProtocol) -> Row:
    """A demonstration in the policy's tokens, as a rollout would have them; the loss is on what the assistant says."""
    prompt, *later = _exchanges(demonstration.messages)
    ids: list[int] = []
    said: list[bool] = []
    for number, (message, after) in enumerate(later):
        tokens = [*chat.encode_said(said_text(protocol, message)), chat.end_id]
        last = number == len(later) - 1
        reply = [] if last else chat.reply_ids(written(protocol, after, {}))
        ids += [*tokens, *reply]
        said += [True] * len(tokens) + [False] * len(reply)
    mask = np.array(said, dtype=bool)
    return Row(
        prompt_ids=tuple(chat.prompt_ids(written(protocol, prompt[1], demonstration.tools))),
        ids=tuple(ids),
        action=mask,
        loss=mask,
        sampling_logprobs=np.zeros(len(ids), dtype=np.float32),
        advantages=mask.astype(np.float32),
    )


def _exchanges(messages: Sequence[Message]) -> list[tuple[Message, list[Message]]]:
    """Each of the assistant's messages with those that follow it; before them an empty one with the prompt."""
    out: list[tuple[Message, list[Message]]] = [(Message(role="assistant", content=""), [])]
    for message in messages:
        if message.role == "assistant":
            out.append((message, []))
        else:
            out[-1][1].append(message)
    return out


def demonstration_rows(
    demonstrations: Sequence[Demonstration], policy: Policy, protocol: TagProtocol, path: Path
) -> list[Row]:
    """The rows of all demonstrations. InputError, with the line's number, for one that the policy cannot take."""
    rows = []
    for demonstration in demonstrations:
        try:
            row = demonstration_row(demonstration, policy.chat, protocol)
        except TurnwiseError as error:
            raise InputError(f"{path}, line {demonstration.line}: {error}") from error
        length = len(row.prompt_ids) + len(row.ids)
        if length > policy.context:
            raise InputError(
                f"{path}, line {demonstration.line}: must fit the policy's context of {policy.context} tokens; it has "
                f"{length}; shorten it"
            )
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------ learning


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What there is to learn."""

    demonstrations: int
    tokens: int
    """Of all demonstrations, once."""
    taught: int
    """Of these, those that the assistant says."""
    longest: int
    """Of one demonstration."""
    steps: int


Watch = Callable[[Counts, int, int, float], None]
"""Called after every step with the counts, the step, the tokens read so far and the loss in nats per token."""


def learn_demonstrations(config: DemonstrationConfig, watch: Watch | None = None) -> Policy:
    """The policy after it has learned a file of demonstrations, written to `config.out`.

    Bad input raises before any work: InputError or ConfigError for the file and the options, RunError for the policy.
    """
    like = TrainConfig(
        policy=config.policy,
        protocol=config.protocol,
        tools=config.tools,
        corpus=config.corpus,
        device=config.device,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        micro_batch_tokens=MICRO_BATCH_TOKENS,  # that of `teach_rows`; and what `results/` started from comes out again
    )
    check_device(config.device)
    like = dataclasses.replace(like, protocol=played_protocol(like))
    protocol = protocol_named(like.protocol)
    found = read_demonstrations(config.demonstrations, protocol, make_tools(like, ()))
    policy = place(start_policy(like), like)
    rows = demonstration_rows(found, policy, protocol, config.demonstrations)
    _learn(policy, rows, config, watch)
    save_policy(policy, config.out)
    return policy


def _learn(policy: Policy, rows: Sequence[Row], config: DemonstrationConfig, watch: Watch | None) -> None:
    lengths = [len(row.prompt_ids) + len(row.ids) for row in rows]
    steps = config.epochs * math.ceil(len(rows) / config.rows)
    counts = Counts(
        demonstrations=len(rows),
        tokens=sum(lengths),
        taught=sum(int(row.loss.sum()) for row in rows),
        longest=max(lengths),
        steps=steps,
    )
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    read = 0
    for step, chosen in enumerate(_batches(len(rows), config), start=1):
        share = np.interp(step / steps, (0, RISE, 1), (0, 1, LAST_RATE))
        batch = [rows[i] for i in chosen]
        loss = teach_rows(policy, optimizer, batch, config.learning_rate * float(share))
        read += sum(lengths[i] for i in chosen)
        if watch:
            watch(counts, step, read, loss)
        if config.token_budget is not None and read >= config.token_budget:
            break


def _batches(count: int, config: DemonstrationConfig) -> Iterator[list[int]]:
    """Which demonstrations each step learns: all of them once an epoch, in an order of its own."""
    rng = random.Random(config.seed)
    for _ in range(config.epochs):
        order = rng.sample(range(count), count)
        yield from (order[i : i + config.rows] for i in range(0, count, config.rows))
