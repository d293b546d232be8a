"""What every engine offers, and the scripted engine: fixed replies, for tests without a model.

An engine continues token ids. It is told which conversation a call belongs to (`session`), so that
it can keep what it computed for the earlier turns; `release` says that the conversation is over.
"""

import asyncio
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from turnwise.errors import ConfigError, InputError, NotFinite


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw a completion."""

    temperature: float = 1.0
    """0 takes the most probable token every time."""
    max_tokens: int
    """Most tokens of one completion, the closing special token included."""
    seed: int
    """Equal seeds draw equal completions from equal prompts."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(
                f"sampling.temperature must be finite and >= 0; got {self.temperature}; "
                "give 0 for greedy or 1 for the policy's own distribution"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"sampling.max_tokens must be >= 1; got {self.max_tokens}; give a positive number")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What an engine drew."""

    token_ids: tuple[int, ...]
    """The closing special token included where it was drawn."""
    logprobs: tuple[float, ...]
    """Log-probability of each token, nats, under the distribution it was drawn from."""
    finish: Literal["stop", "length"]
    """`stop`: the closing token was drawn. `length`: a budget cut the completion off."""


Watch = Callable[[int], None]
"""Told of a token id."""


class Engine(Protocol):
    """Anything that continues token ids under the present policy."""

    policy_version: int
    """How often the policy's weights have been replaced; written into every rollout."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: Hashable) -> Completion:
        """A completion of `prompt_ids`, the whole conversation so far.

        Later calls of one session begin with the ids of its earlier calls.
        """
        ...

    def release(self, session: Hashable) -> None:
        """Forget what was kept for `session`; unknown sessions are no error."""
        ...


class ForkingEngine(Engine, Protocol):
    """An engine whose conversations can branch, as `run_tree` needs it."""

    def fork(self, session: Hashable, into: Hashable) -> None:
        """The new session `into` begins as a copy of `session`; each goes on by itself, and each is released.

        What `into` draws is what it would have drawn as a conversation of its own. Copying what is kept for `session`
        only saves work: where nothing is kept any more, `into` is fed from its beginning. Raises InputError where
        `into` is a session already.
        """
        ...


class WatchedEngine(Engine, Protocol):
    """An engine that can say what it draws while it draws, as a server that streams needs it."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: Hashable, watch: Watch | None = None
    ) -> Completion:
        """As of every engine; `watch` is called with each token id as it is drawn, and must not block."""
        ...


class PolicyEngine(ForkingEngine, WatchedEngine, Protocol):
    """An engine over a policy that learns."""

    def refresh(self, policy_version: int) -> None:
        """The weights have changed. Every session must have been released: nothing cached is left."""
        ...


def check_answered(answered: bool, session: Hashable) -> None:
    """InputError for a session that asks again before its last request is answered."""
    if not answered:
        raise InputError(
            f"a session must wait for its answer before it asks again; got a second request of "
            f"session {session!r}; give every conversation its own session"
        )


def check_prompt(prompt_ids: Sequence[int], *, vocab: int, max_context: int) -> None:
    """InputError for a prompt that leaves no room for a token, or that holds ids outside the vocabulary."""
    if not 1 <= len(prompt_ids) < max_context:
        raise InputError(
            f"a prompt must have 1 to {max_context - 1} tokens (max_context - 1); "
            f"got {len(prompt_ids)}; shorten it or raise max_context"
        )
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= vocab:
        raise InputError(
            f"token ids must be in [0, {vocab}); got {low} to {high}; use the tokenizer that belongs to the model"
        )


def check_finite(logprobs: Iterable[float]) -> None:
    """NotFinite for log-probabilities that no sound model gives."""
    if not all(map(math.isfinite, logprobs)):
        raise not_finite_logits()


def not_finite_logits() -> NotFinite:
    """The error of a completion whose logits are NaN or infinite."""
    return NotFinite(
        "the model must give finite logits; got a log-probability that is not; check the weights (a diverged run?)"
    )


def fail_all(waiting: Iterable[asyncio.Future[Completion]], error: BaseException) -> None:
    """Hands an error to everyone who still waits; one that is no Exception cancels them."""
    for future in waiting:
        if future.done():
            continue
        if isinstance(error, Exception):
            future.set_exception(error)
        else:
            future.cancel()


def fork_onto_session(into: Hashable) -> InputError:
    """The error of a fork whose name is taken."""
    return InputError(f"a fork must be a new session; {into!r} is one already; give it a name of its own")


class Codec(Protocol):
    """Text to token ids and back; the part of a chat format that a scripted engine needs."""

    @property
    def end_id(self) -> int:
        """The special token that closes an assistant message."""
        ...

    def encode_text(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


Replies = Sequence[str] | Mapping[str, Sequence[str]] | Callable[[str], str]


class ScriptedEngine:
    """An engine whose replies are written down beforehand; every log-probability is 0.

    `replies` is one of

    * a list: call k of every session gets reply k;
    * a mapping from question to such a list: a session gets the list of the longest question that
      stands in its first prompt;
    * a function from the prompt's text to the reply.

    Raises InputError where a session asks for more replies than there are, or matches no question.
    """

    def __init__(self, replies: Replies, codec: Codec) -> None:
        if isinstance(replies, str):
            raise ConfigError("replies must be a list, a mapping or a function; got one string; put it in a list")
        self.policy_version = 0
        self._replies = replies
        self._codec = codec
        self._scripts: dict[Hashable, Sequence[str]] = {}
        self._calls: dict[Hashable, int] = {}

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: Hashable, watch: Watch | None = None
    ) -> Completion:
        """The session's next reply and the closing token, cut at `sampling.max_tokens`."""
        reply = self._next_reply(prompt_ids, session)
        ids = (*self._codec.encode_text(reply), self._codec.end_id)
        kept = ids[: sampling.max_tokens]
        if watch:
            for token in kept:
                watch(token)
        finish = "stop" if len(kept) == len(ids) else "length"
        return Completion(token_ids=kept, logprobs=(0.0,) * len(kept), finish=finish)

    def fork(self, session: Hashable, into: Hashable) -> None:
        """`into` goes on in the script where `session` is now."""
        if into in self._calls:
            raise fork_onto_session(into)
        if session in self._calls:
            self._calls[into] = self._calls[session]
        if session in self._scripts:
            self._scripts[into] = self._scripts[session]

    def release(self, session: Hashable) -> None:
        """Forget the session: its next call gets the first reply again."""
        self._scripts.pop(session, None)
        self._calls.pop(session, None)

    def _next_reply(self, prompt_ids: Sequence[int], session: Hashable) -> str:
        if callable(self._replies):
            self._calls[session] = self._calls.get(session, 0) + 1
            return self._replies(self._codec.decode(prompt_ids))
        if session not in self._scripts:
            replies = self._replies
            named = isinstance(replies, Mapping)
            self._scripts[session] = _script(replies, self._codec.decode(prompt_ids)) if named else replies
        script, call = self._scripts[session], self._calls.get(session, 0)
        if call >= len(script):
            raise InputError(
                f"a scripted engine must have a reply for every call; call {call + 1} of session "
                f"{session!r} came, and the script has {len(script)}; add replies"
            )
        self._calls[session] = call + 1
        return script[call]


def _script(replies: Mapping[str, Sequence[str]], prompt: str) -> Sequence[str]:
    """The replies for a conversation that begins with `prompt`."""
    found = [question for question in replies if question in prompt]
    if not found:
        raise InputError(
            "a scripted engine must know the question; none of its "
            f"{len(replies)} questions is in the prompt {prompt[-80:]!r}; add the question"
        )
    return replies[max(found, key=len)]
