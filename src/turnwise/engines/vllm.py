"""The vLLM engine: a model on a GPU, in this process, continued by vLLM and updated from the trainer's weights.

vLLM's engine is stepped by a driver coroutine, as the in-process engine is: one forward pass for everything alive, then
the rollouts may run their tools. vLLM keeps what it computed by its content (prefix caching), so that a session's next
turn, and what a group's prompts have in common, is not computed again; nothing has to be kept per session here.

The engine runs in the trainer's process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so that weights go from one model to the
other on the device, by their Hugging Face names; an adapter is merged into the weights on their way.
"""

import asyncio
import contextlib
import importlib
import itertools
import os
import tempfile
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from turnwise.devices import compute_dtype
from turnwise.engine import (
    Completion,
    Sampling,
    Watch,
    check_answered,
    check_finite,
    check_prompt,
    fail_all,
    fork_onto_session,
)
from turnwise.errors import ConfigError, RunError
from turnwise.lora import plain_weights

FINISHES: dict[str | None, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


@dataclass(eq=False, kw_only=True)
class _Request:
    session: Hashable
    future: asyncio.Future[Completion]
    watch: Watch | None
    seen: int = 0
    """Tokens that `watch` has been told of."""


class VLLMEngine:
    """Continues token ids with vLLM, under the weights that `model` had at the last `refresh`.

    Log-probabilities are those after the temperature (`logprobs_mode="processed_logprobs"`), as of every engine. A
    request has its own seed; equal seeds draw alike as far as vLLM's kernels compute alike in batches of different
    sizes, and not like the in-process engine's. Call `refresh` after every change of the weights.

    Raises ConfigError where vLLM is not installed or refuses the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        stop_ids: Iterable[int],
        max_rows: int = 256,
        max_context: int,
        memory_share: float = 0.4,
    ) -> None:
        self.policy_version = 0
        self.max_context = max_context
        self._model: Any = model
        self._vocab = int(self._model.get_input_embeddings().weight.shape[0])
        self._stop_ids = sorted(stop_ids)
        self._numbers = itertools.count()
        self._requests: dict[str, _Request] = {}  # not answered yet, by vLLM's name
        self._sessions: dict[Hashable, str | None] = {}  # alive, with the name of the latest request
        self._driver: asyncio.Task[None] | None = None
        self._vllm = _imported()
        self._llm = self._made(max_rows, memory_share)
        self._load_weights()

    def _made(self, max_rows: int, memory_share: float) -> Any:
        """vLLM's model with weights of no meaning, from the configuration alone."""
        small = compute_dtype(self._model) is torch.bfloat16  # its configuration has the dtype that it was read in
        with tempfile.TemporaryDirectory() as folder:
            self._model.config.save_pretrained(folder)
            try:
                return self._vllm.LLM(
                    model=folder,
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    dtype="bfloat16" if small else "auto",
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    enable_prefix_caching=True,
                    max_model_len=self.max_context,
                    max_num_seqs=max_rows,
                    gpu_memory_utilization=memory_share,
                )
            except Exception as error:  # whatever vLLM raises for a model, a driver or a card that it cannot use
                raise ConfigError(
                    f"engine vllm must be able to hold the model; it cannot ({_described(error)}); take another "
                    "vllm-memory-share, or engine hf"
                ) from error

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: Hashable, watch: Watch | None = None
    ) -> Completion:
        """A completion of `prompt_ids`, the whole conversation so far.

        Raises InputError for an empty prompt, one longer than `max_context` - 1, a token id outside the vocabulary, or
        a second request of one session before the first is answered.
        """
        check_prompt(prompt_ids, vocab=self._vocab, max_context=self.max_context)
        check_answered(self._sessions.get(session) not in self._requests, session)
        loop = asyncio.get_running_loop()
        name, request = str(next(self._numbers)), _Request(session=session, future=loop.create_future(), watch=watch)
        self._llm.llm_engine.add_request(
            name,
            self._vllm.TokensPrompt(prompt_token_ids=list(map(int, prompt_ids))),
            self._params(sampling, room=self.max_context - len(prompt_ids), watched=watch is not None),
        )
        self._sessions[session], self._requests[name] = name, request
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        try:
            return await request.future
        except asyncio.CancelledError:
            if self._sessions.get(session) == name:
                self.release(session)
            raise

    def fork(self, session: Hashable, into: Hashable) -> None:
        """The new session `into`; what it has in common with `session` is found by its content.

        Raises InputError where `into` is a session already.
        """
        if into in self._sessions:
            raise fork_onto_session(into)
        self._sessions[into] = None

    def release(self, session: Hashable) -> None:
        """Forget the session; a request of it that is still running is cancelled."""
        name = self._sessions.pop(session, None)
        request = self._requests.pop(name, None) if name else None
        if request is not None:
            self._llm.llm_engine.abort_request([name])
            request.future.cancel()

    def refresh(self, policy_version: int) -> None:
        """The weights have changed: vLLM gets them, and nothing that it computed with the old ones is left."""
        assert not self._sessions, f"refresh with {len(self._sessions)} sessions alive"
        self._load_weights()
        self.policy_version = policy_version

    def _load_weights(self) -> None:
        self._llm.apply_model(lambda model: model.load_weights(plain_weights(self._model)))
        if self._llm.reset_prefix_cache() is False:  # earlier versions of vLLM return nothing
            raise RunError("vLLM must forget what it computed with old weights; it did not; use --engine hf")

    def _params(self, sampling: Sampling, *, room: int, watched: bool) -> Any:
        kind = self._vllm.sampling_params.RequestOutputKind
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            max_tokens=min(sampling.max_tokens, room),
            seed=sampling.seed % 2**63,
            logprobs=0,  # the drawn token's alone
            stop_token_ids=self._stop_ids,
            ignore_eos=True,  # `stop_token_ids` name what ends a completion
            detokenize=False,
            output_kind=kind.CUMULATIVE if watched else kind.FINAL_ONLY,
        )

    async def _drive(self) -> None:
        """Steps of vLLM while anybody waits; between two of them the rollouts go on."""
        try:
            while self._requests:
                for output in self._llm.llm_engine.step():
                    self._take(output)
                await asyncio.sleep(0)
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise

    def _take(self, output: Any) -> None:
        request = self._requests.get(output.request_id)
        if request is None:  # released in the meantime
            return
        drawn = output.outputs[0]
        if request.watch:
            for token in drawn.token_ids[request.seen :]:
                request.watch(token)
            request.seen = len(drawn.token_ids)
        if output.finished:
            completion = _completion(drawn)  # what this raises reaches everyone, this request included
            del self._requests[output.request_id]
            if not request.future.done():
                request.future.set_result(completion)

    def _fail(self, error: BaseException) -> None:
        """Hand `error` to everyone who waits; vLLM drops their requests."""
        waiting, self._requests = self._requests, {}
        fail_all([request.future for request in waiting.values()], error)
        with contextlib.suppress(Exception):  # an engine that is dead has told everyone already
            self._llm.llm_engine.abort_request(list(waiting))


def _completion(drawn: Any) -> Completion:
    """vLLM's output as ours: of each position, the log-probability of the token that was drawn there."""
    finish = FINISHES.get(drawn.finish_reason)
    if finish is None:
        raise RunError(f"vLLM must end a completion with stop or length; it ended with {drawn.finish_reason!r}")
    token_ids = tuple(drawn.token_ids)
    logprobs = tuple(float(at[token].logprob) for token, at in zip(token_ids, drawn.logprobs, strict=True))
    check_finite(logprobs)
    return Completion(token_ids=token_ids, logprobs=logprobs, finish=finish)


def _imported() -> Any:
    """The package vLLM, told to stay in this process. ConfigError where it is not installed."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        importlib.import_module("vllm.sampling_params")
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            f'engine vllm must find the package vllm; it does not ({_described(error)}); pip install "turnwise[vllm]" '
            "on a machine with a GPU, or take engine hf"
        ) from error


def _described(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
