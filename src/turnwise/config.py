"""Every option of a training run on one screen; frozen; checked before any work starts."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from turnwise.credit import ESTIMATORS, NEEDS, ONE_PER_ROLLOUT
from turnwise.errors import ConfigError, InputError, unknown_name
from turnwise.protocols import ProtocolName, protocol_named

EXACT_MATCHES = ("paper", "squad", "triviaqa")
"""Whose definitions of exact match there are."""
RATIOS = ("token", "turn", "sequence")
RECORDED = ("tokens", "anchor")
"""The optional columns of the turn table that training fills."""
ATLAS = "atlas"
"""The name of the embedded world, as tasks and as corpus."""
ATLAS_HOPS: Mapping[str, Literal[1, 2]] = {ATLAS: 1, "atlas-two-hop": 2}
"""The embedded world's questions by name, and how many facts each needs."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The defaults are the demo's: the embedded policy, questions and corpus."""

    out: Path = Path("runs/run")
    """Run directory to make."""
    estimator: str = "mt-grpo"
    """How rewards become advantages: grpo-or, grpo-mr, mt-grpo, turn-rloo, ... (see docs/credit.md)."""
    alpha: float = 1.0
    """mt-grpo: weight of later turns' advantages in earlier ones, in [0, 1]."""
    gamma: float = 1.0
    """grpo-mr, turn-rloo: discount of rewards per turn, in (0, 1]. The others keep their papers' own."""

    policy: str = "embedded"
    """The start: "embedded", or a checkpoint folder."""
    tasks: str = ATLAS
    """Training questions: "atlas", "atlas-two-hop", or a JSON-lines file (.jsonl or .jsonl.gz)."""
    validation_tasks: str | None = None
    """Validation questions; by default the atlas's held-out ones, or a tenth of the training file."""
    corpus: str = ATLAS
    """What the search tool searches: "atlas", a JSON-lines file, or a folder of text files."""
    tools: Path | None = None
    """A Python file of tools to use instead of the search tool."""
    rewards: Path | None = None
    """A Python file of reward functions to use beside the built-in ones."""
    reward_weights: dict[str, float] | None = None
    """What each reward component is worth; by default the paper's, for the protocol."""
    exact_match: Literal["paper", "squad", "triviaqa"] = "squad"
    """Whose definition of exact match the rewards use."""

    protocol: ProtocolName = "tools"
    """The tags: "tools" calls tools in JSON; "search" writes queries alone, max-turns - 1 of them at most."""
    search_results: int = 1
    """Articles that a search returns."""
    result_chars: int = 600
    """Most characters of a search result."""
    max_turns: int = 2
    """Most turns of a rollout, the answering one included."""
    max_turn_tokens: int = 64
    """Most sampled tokens of a turn."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""

    seed: int = 0
    """Decides the order of tasks and every draw. Two runs with one seed see the same tasks."""
    steps: int = 60
    """Training steps."""
    tasks_per_step: int = 16
    """Different questions in a step."""
    group_size: int = 16
    """Rollouts of each question."""
    passes: int = 1
    """Optimisation passes over a step's rollouts."""
    minibatches: int = 4
    """Optimiser steps per pass; each takes whole groups."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises."""
    adam_beta2: float = 0.99
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    ratio: Literal["token", "turn", "sequence"] = "token"
    """Over what probability ratios are taken: each token, the mean over a turn, or over the whole rollout."""
    clip_low: float = 0.2
    """How far below 1 a probability ratio counts."""
    clip_high: float = 0.2
    """How far above 1 a probability ratio counts."""
    kl_coef: float = 0.0
    """Weight of the divergence from the start in the loss."""
    micro_batch_tokens: int = 2048
    """Most padded positions computed together in the update."""

    validate_every: int = 20
    """Steps between validations; the first is before training."""
    validation_size: int = 128
    """Questions in a validation, answered greedily."""
    checkpoint_every: int = 20
    """Steps between checkpoints that `--resume` can continue from."""
    log_groups: int = 2
    """Groups of rollouts that every step writes to rollouts.jsonl."""
    threads: int = 0
    """Threads of torch; 0 leaves its own choice."""

    def __post_init__(self) -> None:
        trainable = [name for name in ESTIMATORS if set(NEEDS.get(name, ())) <= set(RECORDED)]
        if self.estimator in ESTIMATORS and self.estimator not in trainable:
            raise ConfigError(
                f"estimator must need no more than training records; {self.estimator} needs "
                f"{' and '.join(NEEDS[self.estimator])}; take another, or give a file with them to `turnwise credit`"
            )
        if self.estimator not in ESTIMATORS:
            raise unknown_name("estimator", self.estimator, trainable)
        for name, low, high in _RANGES:
            _check_number(name, getattr(self, name), low, high)
        _check_number("gamma", self.gamma, 0, 1)
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"gamma must be in (0, 1]; got {self.gamma}; 1 does not discount")
        if self.exact_match not in EXACT_MATCHES:
            raise unknown_name("exact-match", self.exact_match, EXACT_MATCHES)
        if self.ratio not in RATIOS:
            raise unknown_name("ratio", self.ratio, RATIOS)
        if self.ratio == "sequence" and self.estimator not in ONE_PER_ROLLOUT:
            raise ConfigError(
                f"ratio 'sequence' must go with an estimator that gives a whole rollout one advantage; got "
                f"{self.estimator}: the ratio's gradient is the same for all tokens, so only the sum over turns would "
                "count and turn credit be lost; take ratio 'turn'"
            )
        protocol_named(self.protocol)
        _check_weights(self.reward_weights)
        if self.minibatches > self.tasks_per_step:
            raise ConfigError(
                f"minibatches must be <= tasks-per-step ({self.tasks_per_step}), as each takes whole groups; "
                f"got {self.minibatches}; lower it"
            )


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises ConfigError for a value of another kind than the default's, or out of bounds."""
    option, whole = name.replace("_", "-"), isinstance(getattr(TrainConfig, name), int)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ConfigError(f"{option} must be a {'whole ' if whole else ''}number; got {value!r}; give one")
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f"in [{low}, {high}]" if math.isfinite(high) else f">= {low}"
        raise ConfigError(f"{option} must be {bounds}; got {value}; give such a value")


def _check_weights(weights: Any) -> None:
    if weights is None:
        return
    if not isinstance(weights, dict):
        raise ConfigError(f"reward-weights must be a table of numbers by name; got {weights!r}; give one")
    for name, weight in weights.items():
        if not (isinstance(weight, int | float) and math.isfinite(weight)):
            raise ConfigError(f"reward-weights must be finite; {name} is {weight!r}; give a number")


_INF = math.inf
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("alpha", 0, 1),
    ("search_results", 1, 100),
    ("result_chars", 20, 1_000_000),
    ("max_turns", 1, 1000),
    ("max_turn_tokens", 4, 1_000_000),
    ("temperature", 1e-3, 100),
    ("seed", 0, 2**63),
    ("steps", 1, _INF),
    ("tasks_per_step", 1, _INF),
    ("group_size", 1, _INF),
    ("passes", 1, 100),
    ("minibatches", 1, _INF),
    ("learning_rate", 0, 1),
    ("warmup_steps", 0, _INF),
    ("adam_beta2", 0, 0.99999),
    ("max_grad_norm", 1e-9, _INF),
    ("clip_low", 0, 1),
    ("clip_high", 0, _INF),
    ("kl_coef", 0, _INF),
    ("micro_batch_tokens", 16, _INF),
    ("validate_every", 1, _INF),
    ("validation_size", 1, _INF),
    ("checkpoint_every", 1, _INF),
    ("log_groups", 0, _INF),
    ("threads", 0, 4096),
)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration in JSON's types."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def config_from_dict(data: Mapping[str, Any], source: str) -> TrainConfig:
    """The configuration that `config_to_dict` wrote. Raises ConfigError for unknown or ill-typed entries."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in fields:
            raise unknown_name(f"an option in {source}", name, fields)
        is_path = fields[name].type in (Path, Path | None)
        values[name] = Path(value) if is_path and value is not None else value
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise ConfigError(f"options in {source} must have the types of the command line's; got {error}") from error


def read_config_file(path: Path) -> dict[str, Any]:
    """The table in a TOML or JSON file; a run's own config.json counts."""
    import tomllib

    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"a configuration file must exist; {path} does not") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path} must be TOML or JSON; it cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a table of options; got {type(data).__name__}; write name and value pairs")
    return data.get("config", data)
