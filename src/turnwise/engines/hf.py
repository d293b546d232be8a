"""The in-process engine: a transformers causal language model whose key-value cache outlives turns.

Every request is a row of one batch. A driver coroutine runs while there is something to do: it lets
waiting requests in, feeds their new tokens, and then draws one token for every row that is alive,
until rows finish and others take their place. Between two steps it yields, so that the rollouts can
run their tools and come back with the next turn while the other rows go on.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from turnwise.devices import compute_dtype, computing
from turnwise.engine import (
    Completion,
    Sampling,
    Watch,
    check_answered,
    check_prompt,
    fail_all,
    fork_onto_session,
    not_finite_logits,
)
from turnwise.engines.attention import Beginnings, attention_masks, sliding_layers
from turnwise.engines.cache import RowCache
from turnwise.engines.families import check_model, output_logits
from turnwise.engines.sampling import drawn_tokens
from turnwise.errors import ConfigError
from turnwise.quick import is_quick

PREFILL_TOKENS = 8192
"""Most tokens, padding included, of one prefill pass."""
HOLE_STEPS = 16
"""Decode steps of one row that cost about as much as moving it: so long may a hole stay open."""
SHARED_TOKENS = 256
"""From how many on, a beginning that rows have in common is read once for all of them (`benchmarks/beginnings.py`)."""
QUICK_SHARED_TOKENS = 96
"""The same for a quick model, which may round otherwise."""
GRACE_S = 0.02
"""How long an engine with nothing to decode waits for a session to return before it evicts one."""


@dataclass(kw_only=True)
class EngineStats:
    """What an engine has done so far."""

    prefilled_tokens: int = 0
    """Prompt and environment tokens that went through the model; shared prompts count once."""
    decoded_tokens: int = 0
    """Tokens drawn."""
    decode_steps: int = 0
    """Forward passes that drew one token for every row alive."""
    seconds: float = 0.0
    """Wall time in the model, the cache and the drawing; waiting for tools is not in it."""


@dataclass(eq=False, kw_only=True)
class _Request:
    session: Hashable
    prompt: np.ndarray
    sampling: Sampling
    future: asyncio.Future[Completion]
    watch: Watch | None = None


class _Rows:
    """What each row of the batch holds, as arrays, so that a step needs no loop over rows.

    A row is *active* (decoding), *reserved* for its session between turns, or free.
    """

    def __init__(self, rows: int) -> None:
        self.active = np.zeros(rows, bool)
        self.reserved = np.zeros(rows, bool)
        self.watched = np.zeros(rows, bool)  # whether someone wants to know of each token
        self.length = np.zeros(rows, np.int64)  # tokens in the key-value cache; 0 where free
        self.start = np.zeros(rows, np.int64)  # where the tokens of the present request begin
        self.end = np.zeros(rows, np.int64)  # and where its budget ends
        self.used = np.zeros(rows, np.int64)  # decode step of its last token
        self.family = np.zeros(rows, np.int64)  # rows of one family begin with the same tokens,
        self.shared = np.zeros(rows, np.int64)  # so many
        self.temperature = np.zeros(rows)
        self.request = np.full(rows, None, object)
        self.session = np.full(rows, None, object)
        self.tokens = np.zeros((rows, 0), np.int64)
        self.logprobs = np.zeros((rows, 0))
        self.uniforms = np.zeros((rows, 0))

    def reserve(self, length: int) -> None:
        """Room for rows of `length` tokens: a model's whole context, of 100,000 and more, is rarely needed."""
        missing = length - self.tokens.shape[1]
        if missing > 0:
            more = ((0, 0), (0, max(missing, self.tokens.shape[1] // 4)))
            self.tokens, self.logprobs, self.uniforms = (
                np.pad(array, more) for array in (self.tokens, self.logprobs, self.uniforms)
            )

    def move(self, target: np.ndarray, source: np.ndarray) -> None:
        """Rows `source` become rows `target`; both may overlap, as in a swap."""
        for array in vars(self).values():
            array[target] = array[source]

    def num_used(self) -> int:
        """One more than the last active row."""
        active = np.flatnonzero(self.active)
        return int(active[-1]) + 1 if len(active) else 0


class HFEngine:
    """Continues token ids with an in-memory transformers decoder (see docs/models.md for which).

    Batches over everything alive. A session's row stays reserved until `release`, so that its next
    turn feeds only what is new; where sessions outnumber rows, requests wait. Equal waiting prompts
    are fed once. A completion depends on its prompt and its seed, not on what else is in the batch.

    Raises ConfigError for a model whose attention the engine would get wrong. Call
    `refresh` after every change of the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_ids: frozenset[int] | Sequence[int],
        max_rows: int = 256,
        max_context: int,
    ) -> None:
        check_model(model, context=max_context)
        if max_rows < 1 or max_context < 2:
            raise ConfigError(
                "an engine must have max_rows >= 1 and max_context >= 2; "
                f"got {max_rows} and {max_context}; give larger numbers"
            )
        self.policy_version = 0
        self.max_rows = max_rows
        self.max_context = max_context
        self.stats = EngineStats()
        self._model = model
        self._decoder: Any = model.get_decoder()
        self._device = next(model.parameters()).device
        self._draws_on = torch.device("cpu") if self._device.type == "mps" else self._device  # Apple has no float64
        self._vocab = model.get_output_embeddings().weight.shape[0]  # pyright: ignore[reportOptionalMemberAccess]
        self._sliding = sliding_layers(model)
        self._on_processor = self._device.type == "cpu"
        self._shares = self._on_processor and compute_dtype(model) in (torch.float32, torch.float64)
        self._quick = is_quick(model)
        self._is_stop = _stop_table(stop_ids, self._vocab)
        self._waiting: deque[_Request] = deque()
        self._sessions: dict[Hashable, _Request] = {}  # alive, with their latest request
        self._row_of: dict[Hashable, int] = {}
        self._parents: dict[Hashable, Hashable] = {}  # forks that have not asked yet, with the session they come from
        self._families = 0
        self._hole_steps = 0
        self._driver: asyncio.Task[None] | None = None
        self._arrival: asyncio.Event | None = None
        self._is_halted = False
        self._clear()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: Hashable, watch: Watch | None = None
    ) -> Completion:
        """A completion of `prompt_ids`, the whole conversation so far, drawn token by token.

        Raises InputError for an empty prompt, one longer than `max_context` - 1, a token id outside
        the vocabulary, or a second request of one session before the first is answered.
        """
        if self._is_halted:
            raise asyncio.CancelledError
        check_prompt(prompt_ids, vocab=self._vocab, max_context=self.max_context)
        earlier = self._sessions.get(session)
        check_answered(earlier is None or earlier.future.done(), session)
        loop = asyncio.get_running_loop()
        request = _Request(
            session=session,
            prompt=np.asarray(prompt_ids, np.int64),
            sampling=sampling,
            future=loop.create_future(),
            watch=watch,
        )
        self._sessions[session] = request
        self._waiting.append(request)
        self._notify()
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        try:
            return await request.future
        except asyncio.CancelledError:
            if self._sessions.get(session) is request:
                self.release(session)
            raise

    def fork(self, session: Hashable, into: Hashable) -> None:
        """The new session `into` begins with what the row of `session` holds when `into` first gets a row.

        Whatever both conversations begin with then is copied, so `session` may go on in the meantime; where its row is
        gone, `into` is fed from its beginning. Raises InputError where `into` is a session already.
        """
        if into in self._sessions or into in self._parents:
            raise fork_onto_session(into)
        self._parents[into] = session

    def release(self, session: Hashable) -> None:
        """Free the row of `session`; a request of it that is still running is cancelled."""
        self._parents.pop(session, None)
        request = self._sessions.pop(session, None)
        if request is not None and not request.future.done():
            request.future.cancel()
        if request in self._waiting:
            self._waiting.remove(request)
        self._free(session)
        self._notify()

    def refresh(self, policy_version: int) -> None:
        """The weights have changed. Every session must have been released: nothing cached is left."""
        assert not self._sessions, f"refresh with {len(self._sessions)} sessions alive"
        self.policy_version = policy_version

    def halt(self) -> None:
        """From another thread: whoever waits for a completion is cancelled, and whoever asks for one from now on."""
        self._is_halted = True

    # ---- the driver ----

    async def _drive(self) -> None:
        training = self._model.training
        self._model.eval()
        self._arrival = asyncio.Event()
        try:
            while self._waiting or self._rows.active.any():
                began = time.perf_counter()
                admitted = self._admitted()
                if admitted:
                    self._prefill(admitted)
                if self._rows.active.any():
                    self._decode()
                elif not admitted:
                    await self._make_room()
                    continue
                self.stats.seconds += time.perf_counter() - began
                await asyncio.sleep(0)
                if self._is_halted:
                    raise asyncio.CancelledError
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._model.train(training)

    def _admitted(self) -> list[_Request]:
        """The waiting requests that have a row now: their session's own, or a free one."""
        admitted, rest = [], deque()
        free = iter(np.flatnonzero(~self._rows.reserved) if self._waiting else ())
        for request in self._waiting:
            row = self._row_of.get(request.session)
            if row is None:
                row = next(free, None)
            if row is None:
                rest.append(request)
            else:
                self._seat(request, int(row))
                admitted.append(request)
        self._waiting = rest
        return admitted

    def _seat(self, request: _Request, row: int) -> None:
        """Put the request into the row, of which the common prefix with its prompt stays cached."""
        rows, prompt, sampling = self._rows, request.prompt, request.sampling
        size = len(prompt)
        budget = min(sampling.max_tokens, self.max_context - size)
        rows.reserve(size + budget)
        cached = rows.tokens[row, : rows.length[row]]
        rows.length[row] = _common_prefix(cached, prompt[:-1])
        if rows.length[row] < rows.shared[row] or not len(cached):
            self._found_family(row, size)
        rows.tokens[row, :size] = prompt
        rows.start[row], rows.end[row] = size, size + budget
        rows.uniforms[row, size : size + budget] = _uniforms(sampling.seed, budget)
        rows.temperature[row] = sampling.temperature
        rows.request[row], rows.session[row] = request, request.session
        rows.watched[row] = request.watch is not None
        rows.active[row] = rows.reserved[row] = True
        self._row_of[request.session] = row

    def _found_family(self, row: int, length: int) -> None:
        self._families += 1
        self._rows.family[row], self._rows.shared[row] = self._families, length

    async def _make_room(self) -> None:
        """Nothing decodes, no row is free: wait a moment for a session to return or be released,
        then evict the rows that were idle longest; their sessions are fed again on their return."""
        assert self._arrival is not None
        self._arrival.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._arrival.wait(), GRACE_S)
            return
        idle = np.flatnonzero(self._rows.reserved)
        oldest = idle[np.argsort(self._rows.used[idle], kind="stable")]
        for session in self._rows.session[oldest[: len(self._waiting)]]:
            self._free(session)

    def _free(self, session: Hashable) -> None:
        row = self._row_of.pop(session, None)
        if row is not None:
            self._rows.active[row] = self._rows.reserved[row] = False
            self._rows.request[row] = self._rows.session[row] = None
            self._rows.length[row] = 0

    def _fail(self, error: BaseException) -> None:
        """Hand `error` to everyone who waits, and start afresh."""
        running = self._rows.request[self._rows.active]
        fail_all([request.future for request in (*self._waiting, *running)], error)
        self._clear()

    def _clear(self) -> None:
        self._rows = _Rows(self.max_rows)
        self._cache = RowCache(self._sliding, on_processor=self._on_processor)
        self._waiting.clear()
        self._row_of.clear()
        self._parents.clear()

    def _notify(self) -> None:
        if self._arrival is not None:
            self._arrival.set()

    # ---- tensors ----

    @torch.inference_mode()
    def _prefill(self, admitted: list[_Request]) -> None:
        """Feed what is new in the admitted rows, equal prompts once, and draw the first tokens."""
        chosen = np.array([self._row_of[request.session] for request in admitted])
        self._reserve(int(chosen.max()) + 1, int(self._rows.start[chosen].max()) + 1)
        followers = self._followers(admitted)
        leaders = np.array(list(followers))
        new = self._rows.start[leaders] - self._rows.length[leaders]
        for chunk in _chunks(leaders, new):
            hidden = self._feed_prompts(chunk)
            source = np.array([i for i, row in enumerate(chunk) for _ in followers[row]], np.int64)
            target = np.array([row for leader in chunk for row in followers[leader]], np.int64)
            if len(target):
                self._copy(target, chunk[source], self._rows.length[chunk[source]])
                hidden = torch.cat((hidden, hidden[self._tensor(source)]))
            self._draw(hidden, np.concatenate((chunk, target)))

    def _followers(self, admitted: list[_Request]) -> dict[int, list[int]]:
        """The rows to feed, each with the rows that are copies of it once it is fed.

        Of new sessions with equal prompts the first is fed. A fork follows the session that it comes from where both
        ask the same at once; otherwise it gets what that session's row has in common with its prompt.
        """
        rows = self._rows
        asked = {self._row_of[request.session]: request.prompt for request in admitted}
        groups: dict[Hashable, list[int]] = {}
        for request in admitted:
            session, row = request.session, self._row_of[request.session]
            parent = self._row_of.get(self._parents.pop(session)) if session in self._parents else None
            if rows.length[row]:
                groups.setdefault(row, []).insert(0, row)
            elif parent is not None and np.array_equal(asked.get(parent, ()), request.prompt) and rows.length[parent]:
                groups.setdefault(parent, []).append(row)
            else:
                members = groups.setdefault(request.prompt.tobytes(), [])
                members.append(row)
                if parent is not None and len(members) == 1:
                    cached = rows.tokens[parent, : rows.length[parent]]
                    common = _common_prefix(cached, request.prompt[:-1])
                    self._copy(np.array([row]), np.array([parent]), np.array([common]))
        return {members[0]: members[1:] for members in groups.values()}

    def _feed_prompts(self, chunk: np.ndarray) -> torch.Tensor:
        """Feed the new tokens of rows `chunk` [B]; the hidden states of the last ones, [B, d]."""
        rows = self._rows
        cached, size = rows.length[chunk], rows.start[chunk]
        offsets = np.arange((size - cached).max())
        positions = np.minimum(cached[:, None] + offsets, size[:, None] - 1)  # the last one repeats
        is_new = offsets < (size - cached)[:, None]
        hidden = self._forward(
            ids=rows.tokens[chunk[:, None], positions],
            positions=positions,
            write=(np.broadcast_to(chunk[:, None], is_new.shape)[is_new], positions[is_new]),
            source=None if is_new.all() else np.flatnonzero(is_new),
            read=chunk,
        )
        self.stats.prefilled_tokens += int(is_new.sum())
        rows.length[chunk] = size
        last = self._tensor(size - cached - 1)
        return hidden[torch.arange(len(chunk), device=self._device), last]

    def _copy(self, target: np.ndarray, source: np.ndarray, length: np.ndarray) -> None:
        """Give rows `target` the first `length` tokens that rows `source` have cached; [B] each."""
        self._reserve(int(target.max()) + 1, int(length.max()))
        if length.any():
            self._cache.move(target, source, int(length.max()))
        rows = self._rows
        rows.length[target] = length
        joins = length >= rows.shared[source]
        for array in (rows.family, rows.shared):
            array[target[joins]] = array[source[joins]]

    @torch.inference_mode()
    def _decode(self) -> None:
        """Feed every active row its last token and draw the next one."""
        self._close_holes()
        rows = self._rows
        count = rows.num_used()
        active = np.flatnonzero(rows.active[:count])
        batch = np.arange(count)
        length = rows.length[:count]
        # Idle rows in between take part; what they write lies behind their length, out of sight.
        hidden = self._forward(
            ids=rows.tokens[batch, length][:, None],
            positions=length[:, None],
            write=(batch, length),
            source=None,
            read=batch,
            read_length=int(length[active].max()) + 1,
            beginnings=self._beginnings(active, count),
        )[:, 0]
        rows.length[active] += 1
        self.stats.decode_steps += 1
        self._draw(hidden if len(active) == count else hidden[self._tensor(active)], active)

    def _beginnings(self, active: np.ndarray, count: int) -> Beginnings | None:
        """What rows `active` of a batch of `count` begin with, family by family, where it pays to read that once."""
        rows = self._rows
        shared = int(rows.shared[active].min())
        if not self._shares or shared < self._least_shared():
            return None
        _, first, family, sizes = np.unique(
            rows.family[active], return_index=True, return_inverse=True, return_counts=True
        )
        most = int(sizes.max())
        if 2 * len(sizes) > len(active) or len(sizes) * most > 2 * len(active):
            return None
        order = np.argsort(family, kind="stable")
        number = np.arange(len(active)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        members = np.repeat(active[first][:, None], most, axis=1)
        members[family[order], number] = active[order]
        place = np.zeros(count, np.int64)
        place[active[order]] = family[order] * most + number
        return Beginnings(shared, self._tensor(active[first]), self._tensor(members), self._tensor(place))

    def _least_shared(self) -> int:
        return QUICK_SHARED_TOKENS if self._quick else SHARED_TOKENS

    def _close_holes(self) -> None:
        """Move rows from the end into the holes, once the holes have cost as much as that will.

        A hole that is a session's between two turns changes places with the row.
        """
        rows = self._rows
        active = np.flatnonzero(rows.active)
        count = len(active)
        source = active[active >= count]
        self._hole_steps += active[-1] + 1 - count
        if self._hole_steps < HOLE_STEPS * len(source) or not len(source):
            return
        self._hole_steps = 0
        target = np.flatnonzero(~rows.active[:count])
        there, here = np.concatenate((target, source)), np.concatenate((source, target))
        length, free = int(rows.length[here].max()), ~rows.reserved[target]
        swapped = np.tile(~free, 2)
        self._cache.move(target[free], source[free], length)
        self._cache.move(there[swapped], here[swapped], length)
        rows.move(there, here)
        for row, session in zip(there.tolist(), rows.session[there], strict=True):
            if session is not None:
                self._row_of[session] = row

    def _forward(
        self,
        *,
        ids: np.ndarray,
        positions: np.ndarray,
        write: tuple[np.ndarray, np.ndarray],
        source: np.ndarray | None,
        read: np.ndarray,
        read_length: int | None = None,
        beginnings: Beginnings | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, d] of `ids` [B, T] at `positions` [B, T] of cache rows `read`."""
        if read_length is None:
            read_length = int(positions.max()) + 1
        self._reserve(int(read.max()) + 1, int(positions.max()) + 1)
        first, adjacent = int(read[0]), bool((np.diff(read) == 1).all())
        near = self._near(positions, read, read_length)
        place = self._tensor(positions)
        keys = torch.arange(read_length, device=self._device)[None]  # those of a row stand at its first places
        masks = attention_masks(self._model, place, keys, None if near is None else self._tensor(near))
        if beginnings is not None:
            full = masks["full_attention"] if isinstance(masks, dict) else masks
            beginnings = replace(beginnings, mask=full)
        self._cache.aim(
            write=(self._tensor(write[0]), self._tensor(write[1])),
            source=None if source is None else self._tensor(source),
            read=slice(first, first + len(read)) if adjacent else self._tensor(read),
            read_length=read_length,
            near=None if near is None else (self._tensor(read[:, None]), self._tensor(near.clip(0, read_length - 1))),
            beginnings=beginnings,
        )
        with computing(self._model):
            return self._decoder(
                input_ids=self._tensor(ids),
                position_ids=place,
                attention_mask=masks,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state

    def _near(self, positions: np.ndarray, read: np.ndarray, read_length: int) -> np.ndarray | None:
        """The keys that sliding layers read of rows `read` for new tokens at `positions` [B, T]; None: all of a row's.

        Of several tokens after short prompts it is all: to leave keys out changes how sums round, for less gain.
        """
        if not self._sliding:
            return None
        count, window = positions.shape[1], min(self._model.config.sliding_window, read_length)
        short = self._rows.shared[read].min() < self._least_shared() or window + count > read_length
        return None if count > 1 and short else positions[:, :1] + np.arange(1 - window, count)

    def _draw(self, hidden: torch.Tensor, active: np.ndarray) -> None:
        """Draw the next token of rows `active` [B] from `hidden` [B, d]; answer what is done."""
        rows = self._rows
        place = rows.length[active]
        with computing(self._model):
            logits = output_logits(self._model, hidden).to(self._draws_on)
        tokens, logprobs = drawn_tokens(
            logits,
            torch.from_numpy(rows.temperature[active]).to(self._draws_on),
            torch.from_numpy(rows.uniforms[active, place]).to(self._draws_on),
        )
        ids, values = tokens.cpu().numpy(), logprobs.cpu().numpy()
        broken = ~np.isfinite(values)
        if broken.any():
            self._break(active[broken])
            active, place, ids, values = (each[~broken] for each in (active, place, ids, values))
        rows.tokens[active, place] = ids
        rows.logprobs[active, place] = values
        rows.used[active] = self.stats.decode_steps
        self.stats.decoded_tokens += len(active)
        heard = rows.watched[active]
        for request, token in zip(rows.request[active[heard]].tolist(), ids[heard].tolist(), strict=True):
            request.watch(token)
        done = self._is_stop[ids] | (place + 1 == rows.end[active])
        for row in active[done]:
            self._answer(int(row))

    def _break(self, broken: np.ndarray) -> None:
        """Answer rows whose logits are not finite with an error, each its own; nothing of them stays in the cache."""
        rows = self._rows
        self._cache.wipe(self._tensor(broken))
        for row in broken.tolist():
            request: Any = rows.request[row]
            rows.active[row], rows.request[row], rows.length[row] = False, None, 0
            if not request.future.done():
                request.future.set_exception(not_finite_logits())

    def _answer(self, row: int) -> None:
        rows = self._rows
        drawn = slice(rows.start[row], rows.length[row] + 1)
        token_ids = rows.tokens[row, drawn].tolist()
        request = rows.request[row]
        rows.active[row], rows.request[row] = False, None
        if not request.future.done():
            request.future.set_result(
                Completion(
                    token_ids=tuple(token_ids),
                    logprobs=tuple(rows.logprobs[row, drawn].tolist()),
                    finish="stop" if self._is_stop[token_ids[-1]] else "length",
                )
            )

    def _reserve(self, rows: int, length: int) -> None:
        self._cache.reserve(rows, length, max_rows=self.max_rows, max_length=self.max_context)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _uniforms(seed: int, count: int) -> np.ndarray:
    """The first `count` uniforms of the request's own stream, [count] in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64)).random(count)


def _common_prefix(cached: np.ndarray, prompt: np.ndarray) -> int:
    """How many tokens both begin with."""
    size = min(len(cached), len(prompt))
    different = np.flatnonzero(cached[:size] != prompt[:size])
    return int(different[0]) if len(different) else size


def _chunks(rows: np.ndarray, new: np.ndarray) -> Iterable[np.ndarray]:
    """`rows` [B] in pieces with like numbers of `new` [B] tokens, each at most PREFILL_TOKENS."""
    order = np.argsort(new, kind="stable")[::-1]
    while len(order):
        size = max(1, PREFILL_TOKENS // int(new[order[0]]))
        yield np.sort(rows[order[:size]])
        order = order[size:]


def _stop_table(stop_ids: Iterable[int], vocab: int) -> np.ndarray:
    """Whether each token id ends a completion, [V]."""
    ids = np.array(sorted(stop_ids), np.int64)
    if len(ids) and (ids[0] < 0 or ids[-1] >= vocab):
        raise ConfigError(
            f"stop_ids must be in [0, {vocab}), the model's vocabulary; got {ids.tolist()}; "
            "use the tokenizer that belongs to the model"
        )
    table = np.zeros(vocab, bool)
    table[ids] = True
    return table
