"""A stand-in for the package vLLM: the classes that `turnwise.engines.vllm` uses, with their names and arguments.

The names are those of vLLM's published API (0.11 to 0.32: `LLM`, `LLM.llm_engine`, `LLM.apply_model`,
`LLM.reset_prefix_cache`, `LLMEngine.add_request`, `step` and `abort_request`, `SamplingParams`, `RequestOutputKind`,
`TokensPrompt`, `RequestOutput`, `CompletionOutput`, `Logprob`). An argument that the real one does not have is an
error. Behind them stands a transformers model on the CPU: `step` draws one token for every request, and a prefix cache
keeps logits by content until it is reset, whatever becomes of the weights.
"""

import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass(kw_only=True)
class TokensPrompt:
    prompt_token_ids: list[int]


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


@dataclass(kw_only=True)
class _Request:
    prompt: list[int]
    params: SamplingParams
    generator: torch.Generator
    drawn: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


class _Loadable:
    """What vLLM's models offer to whoever brings weights."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own = dict(self.model.named_parameters())
        named = dict(weights)
        with torch.no_grad():
            for name, weight in named.items():
                own[name].copy_(weight)
        return set(named)


class LLMEngine:
    def __init__(self, model: Any, max_model_len: int, max_num_seqs: int) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.requests: dict[str, _Request] = {}
        self.cached: dict[tuple[int, ...], torch.Tensor] = {}
        self.fed = 0
        self.aborted: list[str] = []

    def add_request(self, request_id: str, prompt: TokensPrompt, params: SamplingParams) -> str:
        assert request_id not in self.requests
        assert len(prompt.prompt_token_ids) < self.max_model_len
        assert params.max_tokens is not None
        assert len(prompt.prompt_token_ids) + params.max_tokens <= self.max_model_len
        assert params.seed is not None
        assert 0 <= params.seed < 2**63
        generator = torch.Generator().manual_seed(params.seed)
        self.requests[request_id] = _Request(prompt=prompt.prompt_token_ids, params=params, generator=generator)
        return request_id

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self.aborted.append(name)
            self.requests.pop(name, None)

    def step(self) -> list[RequestOutput]:
        outputs = []
        for name, request in list(self.requests.items())[: self.max_num_seqs]:
            reason = self._draw(request)
            if reason:
                del self.requests[name]
            if reason or request.params.output_kind is RequestOutputKind.CUMULATIVE:
                drawn = CompletionOutput(0, "", list(request.drawn), list(request.logprobs), reason)
                outputs.append(RequestOutput(name, request.prompt, [drawn], reason is not None))
        return outputs

    def _draw(self, request: _Request) -> str | None:
        """One token more; why it was the last one."""
        params = request.params
        logits = self._logits((*request.prompt, *request.drawn))
        logprobs = (logits / (params.temperature or 1.0)).log_softmax(-1)
        noise = torch.empty_like(logprobs).exponential_(generator=request.generator)
        token = int(logits.argmax() if params.temperature == 0 else (logprobs.exp() / noise).argmax())
        request.drawn.append(token)
        # Asked for 0 of the most probable ones, vLLM gives the drawn one.
        request.logprobs.append({token: Logprob(float(logprobs[token]))})
        if token in (params.stop_token_ids or ()):
            return "stop"
        return "length" if len(request.drawn) == params.max_tokens else None

    def _logits(self, ids: tuple[int, ...]) -> torch.Tensor:
        if ids not in self.cached:
            known = next((n for n in range(len(ids) - 1, 0, -1) if ids[:n] in self.cached), 0)
            self.fed += len(ids) - known
            with torch.no_grad():
                logits = self.model(torch.tensor([ids])).logits[0].double()
            self.cached |= {ids[: n + 1]: logits[n] for n in range(known, len(ids))}
        return self.cached[ids]


class LLM:
    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        load_format: str = "auto",
        generation_config: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        enable_prefix_caching: bool | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        gpu_memory_utilization: float = 0.9,
        dtype: str = "auto",
    ) -> None:
        assert (load_format, logprobs_mode) == ("dummy", "processed_logprobs")
        assert skip_tokenizer_init
        assert enable_prefix_caching
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError("gpu_memory_utilization must be in (0, 1]")
        config = AutoConfig.from_pretrained(model)
        config._attn_implementation = "sdpa"
        torch.manual_seed(99)
        self._model = AutoModelForCausalLM.from_config(config).eval()
        self.llm_engine = LLMEngine(self._model, max_model_len or 64, max_num_seqs or 256)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        return [func(_Loadable(self._model))]

    def reset_prefix_cache(self) -> bool:
        self.llm_engine.cached.clear()
        return not self.llm_engine.requests


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `import vllm` find this module."""
    package, params = types.ModuleType("vllm"), types.ModuleType("vllm.sampling_params")
    vars(package).update(LLM=LLM, SamplingParams=SamplingParams, TokensPrompt=TokensPrompt, sampling_params=params)
    vars(params).update(SamplingParams=SamplingParams, RequestOutputKind=RequestOutputKind)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
