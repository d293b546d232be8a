"""Every option of a training run on one screen; frozen; checked before any work starts."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from turnwise.credit import ESTIMATORS, NEEDS, ONE_PER_ROLLOUT, TOKEN_ESTIMATORS
from turnwise.errors import ConfigError, InputError, unknown_name
from turnwise.judge import JudgeConfig
from turnwise.protocols import NATIVE, ProtocolName, protocol_named
from turnwise.records import parsed
from turnwise.rewards import BUILT_IN, DEFAULT_WEIGHTS, ENVIRONMENT_WEIGHTS, JUDGED, OF_RECORDS
from turnwise.rollout import check_branches
from turnwise.tasks import parse_columns

ENGINES = ("hf", "vllm")
EXACT_MATCHES = ("paper", "squad", "triviaqa")
"""Whose definitions of exact match there are."""
RATIOS = ("token", "turn", "sequence")
DTYPES = ("float32", "bfloat16", "mixed")
DEVICES = ("auto", "cpu", "cuda", "mps")
CORRECTIONS = ("none", "truncate", "mask")
RECORDED = ("tokens", "anchor")
"""The optional columns of the turn table that training fills without a critic."""
CRITIC_METHODS = (*TOKEN_ESTIMATORS, "turn-ppo", "step-ppo")
"""The estimators that training makes a critic for."""
TRAINABLE = (*(name for name in ESTIMATORS if set(NEEDS.get(name, ())) <= set(RECORDED)), *CRITIC_METHODS)
"""The estimators that training can use on rollouts that do not branch."""
BRANCHING = tuple(name for name in ESTIMATORS if "node" in NEEDS.get(name, ()))
"""Those for rollouts that branch."""
DISCOUNTED = ("grpo-mr", "turn-rloo", "gtpo", *CRITIC_METHODS)
"""Those that take `gamma`."""
CRITICS = ("own", "shared")
TRACKERS = ("tensorboard", "wandb", "trackio")
PLACEBOS = ("turns", "rollouts", "end")
CONTROLS = ("placebo", "outcome_noise", "tool_failures")
"""The options that disturb what training sees, for comparisons."""
MICRO_BATCH_TOKENS = 2048
AGGREGATIONS = ("sequence-mean", "token-mean", "turn-mean", "constant")
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
    """How rewards become advantages: grpo-or, mt-grpo, turn-rloo, ppo-or, mt-ppo, turn-ppo, ... (docs/credit.md)."""
    alpha: float = 1.0
    """mt-grpo, mt-grpo-tree: weight of later turns' advantages in earlier ones, in [0, 1]."""
    gamma: float | None = None
    """Discount in (0, 1]; by default the method's own. Per token: ppo-or, ppo-mr, mt-ppo, mt-ppo-paid-at-end (1). Per
    turn: turn-ppo, step-ppo (.99), bi-level-gae, vetta (.95), gtpo (.9), grpo-mr, turn-rloo (1). The others keep their
    papers'."""
    lam: float | None = None
    """Lambda of GAE in [0, 1], per token or turn as `gamma`; by default the method's own: ppo-or, ppo-mr, mt-ppo,
    mt-ppo-paid-at-end, step-ppo, bi-level-gae 1, turn-ppo .9, vetta .95."""
    critic: Literal["own", "shared"] = "own"
    """Methods with a critic: on a trunk of its own, or a head on the policy's states (see docs/ppo.md)."""
    critic_learning_rate: float = 1e-3
    """Peak learning rate of the critic's AdamW."""
    critic_warmup_steps: int = 0
    """First steps in which only the critic learns."""
    value_clip: float = 0.5
    """How far the value loss lets a value move in a step."""
    whiten: bool | None = None
    """Methods with a critic: whiten advantages over the step's sampled tokens. By default token methods do, turn-ppo
    and step-ppo (which whitens over turns itself) do not."""

    dtype: Literal["float32", "bfloat16", "mixed"] = "float32"
    """Numbers of weights and operations; "mixed" keeps float32 weights and computes in bfloat16 (docs/memory.md)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the policy computes; "auto" takes a GPU where there is one, for 20 million parameters or more."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them."""

    policy: str = "embedded"
    """The start: "embedded" (the one for the protocol), a checkpoint folder, or a model of the Hugging Face hub."""
    lora_rank: int = 0
    """Learn matrices of this rank beside the policy's, which stay as they are (LoRA); 0 learns all weights."""
    lora_alpha: float | None = None
    """What LoRA's products are multiplied by, times the rank; by default twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers beside which LoRA learns; by default all linear layers but the output layer."""
    tasks: str = ATLAS
    """Training questions: "atlas", "atlas-two-hop", a file of JSON lines, a JSON list or Parquet, or a data set
    hf:NAME[:CONFIG][:SPLIT] (docs/data.md)."""
    validation_tasks: str | None = None
    """Validation questions; by default the atlas's held-out ones, or a tenth of the training file."""
    columns: str | None = None
    """Which columns of the files of questions hold ours, where they have other names: question=prompt,answers=gold."""
    corpus: str = ATLAS
    """What the search tool searches: "atlas", a JSON-lines file, or a folder of text files."""
    tools: str | None = None
    """Tools instead of the search tool, parted by commas: search, calculator, python, a Python file, mcp:COMMAND, the
    URL of an MCP server, a JSON or TOML file of MCP servers."""
    environment: str | None = None
    """An environment from elsewhere instead of tools and tags: a Python file with make(task), gym:ID, openenv:URL or
    textworld:. Tasks are its own unless --tasks names others (docs/environments.md)."""
    rewards: Path | None = None
    """A Python file of reward functions to use beside the built-in ones."""
    reward_weights: dict[str, float] | None = None
    """What each reward component is worth; by default the paper's, for the protocol."""
    exact_match: Literal["paper", "squad", "triviaqa"] = "squad"
    """Whose definition of exact match the rewards use."""

    placebo: Literal["turns", "rollouts", "end"] | None = None
    """A control: learn from turn rewards that are dealt out anew among each rollout's turns, or among the group's
    rollouts at each turn, or that are paid at the end (docs/compare.md)."""
    outcome_noise: float = 0.0
    """A control: standard deviation of normal noise on the outcome reward of every rollout that is learned from."""
    tool_failures: float = 0.0
    """A control: the probability that a tool's result is lost, in training rollouts."""

    judge_url: str | None = None
    """An OpenAI-compatible endpoint whose model judges the rollouts, such as http://127.0.0.1:8000/v1."""
    judge_model: str | None = None
    """The judge's model, by the endpoint's name for it."""
    judge_key_env: str | None = None
    """The environment variable that holds the endpoint's key, where it wants one."""
    judge_rubric: Path | None = None
    """A text file by which turns are judged, instead of the built-in rubric."""
    judge_outcome_rubric: Path | None = None
    """A text file by which final answers are judged, instead of the built-in rubric."""
    judge_concurrency: int = 8
    """Most requests to the judge at once."""
    judge_timeout_s: float = 30.0
    """Seconds that one request to the judge may take."""
    judge_cache: Path | None = None
    """Folder of the judge's replies; by default in the user's cache folder."""

    protocol: ProtocolName = "tools"
    """The format: "tools" calls tools in JSON in the paper's tags; "search" writes queries alone, max-turns - 1 of them
    at most; "native" is what the policy's own chat template writes: hermes, llama3 or qwen3-coder (docs/formats.md)."""
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

    engine: Literal["hf", "vllm"] = "hf"
    """What draws the rollouts: the in-process engine, or vLLM on a GPU (docs/engines.md)."""
    vllm_memory_share: float = 0.4
    """Engine vllm: the share of the GPU's memory that it may take, weights included; training needs the rest."""

    seed: int = 0
    """Decides the order of tasks and every draw. Two runs with one seed see the same tasks."""
    steps: int = 60
    """Training steps."""
    tasks_per_step: int = 16
    """Different questions in a step."""
    group_size: int = 16
    """Rollouts of each question, where they do not branch."""
    branches: tuple[int, ...] = ()
    """Draw a tree per question instead: 4 2 draws four first turns and two second ones after each."""
    dynamic_sampling: int = 0
    """Replace questions whose rollouts show no difference by the next ones, in so many extra rounds of a step at most
    (DAPO, arXiv 2503.14476)."""
    token_budget: int | None = None
    """End the run once it has sampled so many tokens in training rollouts, if `steps` do not end it before."""
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
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Weigh tokens by trainer's / sampler's probability where the two differ: at most sampler-cap, or 0 beyond it."""
    sampler_cap: float = 2.0
    """The largest such weight; with "mask" also the inverse of the smallest."""
    aggregation: Literal["sequence-mean", "token-mean", "turn-mean", "constant"] = "sequence-mean"
    """What a token weighs in the loss: means over rollouts, tokens or turns, or a constant (max-turns x
    max-turn-tokens per rollout)."""
    kl_coef: float = 0.0
    """Weight of the divergence from the start in the loss."""
    micro_batch_tokens: int | None = None
    """Most padded positions computed together in the update; by default 2048, and for a small policy on a processor as
    many less as make micro-batches even in number and alike, which cores share. A size that is set also keeps such a
    policy to transformers' own operations, as `results/` was computed; else it has fewer (docs/performance.md)."""

    ahead: bool = False
    """Draw the next step's rollouts while a step is learned from; they are then one update old (docs/engines.md)."""

    validate_every: int = 20
    """Steps between validations; the first is before training."""
    validation_size: int = 128
    """Questions in a validation, answered greedily."""
    checkpoint_every: int = 0
    """Steps between checkpoints that `--resume` can continue from; 0 saves every step of a policy of fewer than 20
    million parameters, and every 20th of a larger one."""
    skip_limit: int = 10
    """How many optimiser steps in a row may be skipped, as loss or gradient is not finite, before the run stops."""
    max_failed_share: float = 0.5
    """Stop where more than this share of the last five steps' rollouts failed by tools, environment or judge."""
    log_groups: int = 2
    """Groups of rollouts that every step writes to rollouts.jsonl."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Where metrics go beside metrics.jsonl (docs/data.md)."""
    threads: int = 0
    """Cores to use; 0 leaves torch its own choice. A small policy computes as many parts of a step at once."""

    def __post_init__(self) -> None:
        self._make_paths()
        for name, low, high in _RANGES:
            _check_number(name, getattr(self, name), low, high)
        _check_tree(self.branches, self.max_turns, self.ratio)
        _check_estimator(self.estimator, branching=bool(self.branches))
        for option, value, known in (
            ("aggregation", self.aggregation, AGGREGATIONS),
            ("critic", self.critic, CRITICS),
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, DEVICES),
            ("sampler-correction", self.sampler_correction, CORRECTIONS),
            ("exact-match", self.exact_match, EXACT_MATCHES),
            ("ratio", self.ratio, RATIOS),
            ("placebo", self.placebo, (None, *PLACEBOS)),
            ("tracker", self.tracker, (None, *TRACKERS)),
        ):
            if value not in known:
                raise unknown_name(option, str(value), [name for name in known if name])
        self._check_critic()
        self._check_engine()
        self._check_lora()
        self._check_sampling()
        self._check_controls()
        if self.ratio == "sequence" and self.estimator not in ONE_PER_ROLLOUT:
            raise ConfigError(
                f"ratio 'sequence' must go with an estimator that gives a whole rollout one advantage; got "
                f"{self.estimator}: the ratio's gradient is the same for all tokens, so only the sum over turns would "
                "count and turn credit be lost; take ratio 'turn'"
            )
        if self.token_budget is not None:
            _check_number("token_budget", self.token_budget, 1, _INF, whole=True)
        if self.micro_batch_tokens is not None:
            _check_number("micro_batch_tokens", self.micro_batch_tokens, 16, _INF, whole=True)
        if self.protocol != NATIVE:
            protocol_named(self.protocol)
        self._check_columns()
        _check_weights(self.reward_weights)
        self._check_environment()
        self._check_judge()
        if self.minibatches > self.tasks_per_step:
            raise ConfigError(
                f"minibatches must be <= tasks-per-step ({self.tasks_per_step}), as each takes whole groups; "
                f"got {self.minibatches}; lower it"
            )

    def _make_paths(self) -> None:
        """Texts in the place of paths become paths, and paths of tools texts."""
        if isinstance(self.tools, Path):
            object.__setattr__(self, "tools", str(self.tools))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (Path, Path | None) and isinstance(value, str):
                object.__setattr__(self, field.name, Path(value))

    def _check_columns(self) -> None:
        """Raises ConfigError for columns that are no mapping, and for those of the embedded world."""
        if self.columns is None:
            return
        parse_columns(self.columns)
        if self.tasks in ATLAS_HOPS and self.validation_tasks in (None, *ATLAS_HOPS):
            raise ConfigError(
                f"columns must go with a file of questions; tasks are {self.tasks!r}; name a file, or leave columns out"
            )

    def _check_critic(self) -> None:
        """Raises ConfigError for discounts out of range, and for options of critics where there is none."""
        if self.gamma is not None:
            _check_number("gamma", self.gamma, 0, 1)
            if self.gamma == 0:
                raise ConfigError(f"gamma must be in (0, 1]; got {self.gamma}; 1 does not discount")
        if self.lam is not None:
            _check_number("lam", self.lam, 0, 1)
        if self.whiten is not None and not isinstance(self.whiten, bool):
            raise ConfigError(f"whiten must be true or false; got {self.whiten!r}; give one, or leave it out")
        if self.gamma is not None and self.estimator not in DISCOUNTED:
            raise ConfigError(
                f"gamma must go with a method that takes it; got {self.estimator}; leave it out, or take one of "
                f"{', '.join(DISCOUNTED)}"
            )
        if self.estimator not in CRITIC_METHODS:
            for name in _CRITIC_OPTIONS:
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise ConfigError(
                        f"{name.replace('_', '-')} must go with a method that has a critic; got {self.estimator}; "
                        f"leave it out, or take one of {', '.join(CRITIC_METHODS)}"
                    )

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        if self.engine != "vllm" and self.vllm_memory_share != TrainConfig.vllm_memory_share:
            raise ConfigError(f"vllm-memory-share must go with engine vllm; got engine {self.engine}; leave it out")

        if not isinstance(self.ahead, bool):
            raise ConfigError(f"ahead must be true or false; got {self.ahead!r}; give one")
        if self.ahead and self.engine == "vllm":
            raise ConfigError(
                "ahead must go with engine hf, which draws with a copy of the policy; vLLM in this process has one set "
                "of weights, that of the last update, and is stepped by the thread that trains; leave one of them out"
            )

    def _check_lora(self) -> None:
        """Raises ConfigError for options of LoRA where there is none, and for a critic that would copy the model."""
        if not self.lora_rank:
            for name in ("lora_alpha", "lora_targets"):
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise ConfigError(
                        f"{name.replace('_', '-')} must go with LoRA; lora-rank is 0; leave it out, or give a rank"
                    )
            return
        if self.lora_alpha is not None:
            _check_number("lora_alpha", self.lora_alpha, 1e-9, _INF, whole=False)
        if not all(isinstance(name, str) and name for name in self.lora_targets):
            raise ConfigError(f"lora-targets must be names of layers; got {self.lora_targets}; such as q_proj v_proj")
        if self.estimator in CRITIC_METHODS and self.critic == "own":
            raise ConfigError(
                "critic 'own' must not go with lora-rank: its trunk would be a second copy of the whole model; take "
                "--critic shared"
            )

    def _check_sampling(self) -> None:
        """Raises ConfigError for dynamic sampling that would never end well, and for a cap of nothing."""
        if not isinstance(self.gradient_checkpointing, bool):
            raise ConfigError(
                f"gradient-checkpointing must be true or false; got {self.gradient_checkpointing!r}; give one"
            )
        if self.dynamic_sampling and self.estimator in CRITIC_METHODS:
            raise ConfigError(
                f"dynamic-sampling must go with a method that compares rollouts of one question; {self.estimator} "
                "learns from every rollout by its critic; leave it out"
            )
        if self.dynamic_sampling and self.group_size < 2 and not self.branches:
            raise ConfigError(
                f"dynamic-sampling must have rollouts to compare; got group-size {self.group_size}; take 2 or more"
            )
        if self.sampler_correction == "none" and self.sampler_cap != TrainConfig.sampler_cap:
            raise ConfigError(
                f"sampler-cap must go with sampler-correction truncate or mask; got {self.sampler_cap} with none; "
                "leave it out, or name a correction"
            )

    def _check_controls(self) -> None:
        """Raises ConfigError for a control where what it disturbs is shared by rollouts, or chosen by."""
        for name in CONTROLS:
            if not getattr(self, name):
                continue
            for other in ("branches", "dynamic_sampling"):
                if getattr(self, other):
                    raise ConfigError(
                        f"{name.replace('_', '-')} must go with rollouts that are each drawn and kept alone; got "
                        f"{other.replace('_', '-')}; leave one of them out"
                    )

    def _check_environment(self) -> None:
        """Raises ConfigError for options of tools and tags where an environment from elsewhere has neither."""
        if self.environment is None:
            return
        for name in TOOL_OPTIONS:
            if getattr(self, name) != getattr(TrainConfig, name):
                raise ConfigError(
                    f"{name.replace('_', '-')} must go with the environment of tools; got an environment from "
                    f"elsewhere, {self.environment}, which reads and answers messages itself; leave one of them out"
                )
        for name in self.weights:
            if name in BUILT_IN and name not in OF_RECORDS:
                raise ConfigError(
                    f"reward-weights must name what an environment's rollouts can have; got {name}, which looks for "
                    f"tags; leave it out; of the built-in ones there are {', '.join(OF_RECORDS)}"
                )

    def _check_judge(self) -> None:
        """Bad options of the judge, and options of a judge that is not there, raise here."""
        if self.judge and self.judge.turns and self.estimator in ("mt-grpo-tree", "slate"):
            raise ConfigError(
                f"{self.estimator} must have turn rewards that are alike where rollouts share the turn; a judge scores "
                "each rollout on its own; set judge_turn to 0 in reward-weights, or take treerl, carl or tree-grpo"
            )
        if self.judge:
            return
        if self.judge_url is not None:
            raise ConfigError(
                "reward-weights must keep judge_turn or judge_outcome where there is a judge; both are 0; leave out "
                "judge-url, or weigh one of them"
            )
        given = [name for name in _JUDGE_OPTIONS if getattr(self, name) is not None]
        given += [name for name in JUDGED if self.weights.get(name)]
        if given:
            raise ConfigError(
                f"{given[0].replace('_', '-')} must come with a judge; there is no judge-url; name the endpoint"
            )

    @property
    def column_names(self) -> dict[str, str] | None:
        """The mapping that `columns` writes."""
        return parse_columns(self.columns) if self.columns else None

    @property
    def start(self) -> str:
        """The policy to start from: `policy`, where "embedded" is the one that ships for the protocol."""
        return "embedded-search" if (self.policy, self.protocol) == ("embedded", "search") else self.policy

    @property
    def weights(self) -> Mapping[str, float]:
        """What each reward component is worth: `reward_weights`, or the protocol's, or an environment's own rewards."""
        if self.reward_weights is not None:
            return self.reward_weights
        return ENVIRONMENT_WEIGHTS if self.environment else DEFAULT_WEIGHTS[self.protocol]

    @property
    def tag_protocol(self) -> ProtocolName | None:
        """The tags of the rollouts; None in an environment from elsewhere."""
        return None if self.environment else self.protocol

    @property
    def micro_batch_budget(self) -> int:
        """`micro_batch_tokens`, or what they are where nothing else decides."""
        return MICRO_BATCH_TOKENS if self.micro_batch_tokens is None else self.micro_batch_tokens

    @property
    def judge(self) -> JudgeConfig | None:
        """The judge, asked for the components of a nonzero weight; None where there is none or nothing to ask."""
        turns, outcome = (self.weights.get(name, 1.0) != 0 for name in JUDGED)
        if self.judge_url is None or not (turns or outcome):
            return None
        return JudgeConfig(
            url=self.judge_url,
            model=self.judge_model or "",
            turns=turns,
            outcome=outcome,
            key_env=self.judge_key_env,
            turn_rubric=self.judge_rubric,
            outcome_rubric=self.judge_outcome_rubric,
            concurrency=self.judge_concurrency,
            timeout_s=self.judge_timeout_s,
            cache=self.judge_cache,
        )


def _check_estimator(name: str, *, branching: bool) -> None:
    """Raises ConfigError for a name that is unknown, or a method that does not fit the rollouts that are drawn."""
    fitting = BRANCHING if branching else TRAINABLE
    if name in fitting:
        return
    if name in BRANCHING:
        raise ConfigError(
            f"estimator {name} must have rollouts that branch; branches is empty; give for example --branches 4 2"
        )
    if name in TRAINABLE:
        raise ConfigError(
            f"branches must go with an estimator that knows shared turns; {name} would compare leaves that share turns "
            f"as if each were drawn alone; take one of {', '.join(BRANCHING)}, or leave branches out"
        )
    if name in ESTIMATORS:
        raise ConfigError(
            f"estimator must need no more than training records; {name} needs {' and '.join(NEEDS[name])}; take "
            "another, or give a file with them to `turnwise credit`"
        )
    raise unknown_name("estimator", name, fitting)


def _check_tree(branches: Any, max_turns: int, ratio: str) -> None:
    """Raises ConfigError for a tree that cannot be drawn, or whose shared turns a loss would count several times."""
    if branches == ():
        return
    check_branches(branches)
    if len(branches) > max_turns:
        raise ConfigError(
            f"branches must name at most max-turns ({max_turns}) turns; got {len(branches)}; name fewer, or raise "
            "max-turns"
        )
    if ratio == "sequence":
        raise ConfigError(
            "ratio 'sequence' must go with rollouts that share no turns; with branches each leaf's ratio would train "
            "its shared turns again; take ratio 'turn' or 'token'"
        )


def _check_number(name: str, value: Any, low: float, high: float, *, whole: bool | None = None) -> None:
    """Raises ConfigError for a value of another kind than the default's, or out of bounds."""
    option, whole = name.replace("_", "-"), isinstance(getattr(TrainConfig, name), int) if whole is None else whole
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


_CRITIC_OPTIONS = ("lam", "whiten", "critic", "critic_learning_rate", "critic_warmup_steps", "value_clip")
"""The options that mean nothing without a critic."""
TOOL_OPTIONS = ("protocol", "tools", "corpus", "search_results", "result_chars", "judge_url", "tool_failures")
"""The options that mean nothing in an environment from elsewhere."""
_JUDGE_OPTIONS = ("judge_model", "judge_key_env", "judge_rubric", "judge_outcome_rubric", "judge_cache")
"""The options that mean nothing without a judge's URL."""
_INF = math.inf
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("alpha", 0, 1),
    ("outcome_noise", 0, 1_000_000),
    ("tool_failures", 0, 1),
    ("judge_concurrency", 1, 256),
    ("judge_timeout_s", 0.01, 3600),
    ("search_results", 1, 100),
    ("result_chars", 20, 1_000_000),
    ("max_turns", 1, 1000),
    ("max_turn_tokens", 4, 1_000_000),
    ("temperature", 1e-3, 100),
    ("vllm_memory_share", 0.01, 1),
    ("lora_rank", 0, 65536),
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
    ("critic_learning_rate", 0, 1),
    ("critic_warmup_steps", 0, _INF),
    ("value_clip", 1e-9, _INF),
    ("clip_low", 0, 1),
    ("clip_high", 0, _INF),
    ("kl_coef", 0, _INF),
    ("dynamic_sampling", 0, 1000),
    ("sampler_cap", 1, _INF),
    ("validate_every", 1, _INF),
    ("validation_size", 1, _INF),
    ("checkpoint_every", 0, _INF),
    ("skip_limit", 1, _INF),
    ("max_failed_share", 0, 1),
    ("log_groups", 0, _INF),
    ("threads", 0, 4096),
)


def without_judge(config: TrainConfig) -> TrainConfig:
    """The configuration with nobody to judge; its judge's rewards are absent then."""
    given = config.reward_weights
    weights = None if given is None else {name: weight for name, weight in given.items() if name not in JUDGED}
    nobody = dict.fromkeys(["judge_url", *_JUDGE_OPTIONS])
    return dataclasses.replace(config, reward_weights=weights, **nobody)


def on_engine(config: TrainConfig, engine: Literal["hf", "vllm"]) -> TrainConfig:
    """The configuration with another engine, and no share of memory for one that takes none."""
    share = config.vllm_memory_share if engine == "vllm" else TrainConfig.vllm_memory_share
    return dataclasses.replace(config, engine=engine, vllm_memory_share=share)


def without_branches(config: TrainConfig) -> TrainConfig:
    """The configuration for rollouts that are played alone, with no method that needs others."""
    if not config.branches:
        return config
    return dataclasses.replace(config, branches=(), estimator=TrainConfig.estimator, dynamic_sampling=0)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration in JSON's types."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def config_from_dict(data: Mapping[str, Any], source: str) -> TrainConfig:
    """The configuration that `config_to_dict` wrote, or a file's options, spelt with `_` or `-`.

    Raises ConfigError for unknown or ill-typed entries.
    """
    fields = {f.name: f.type for f in dataclasses.fields(TrainConfig)}
    values: dict[str, Any] = {}
    for given, value in data.items():
        name = given.replace("-", "_")
        if name not in fields:
            raise unknown_name(f"an option in {source}", name, fields)
        if name in values:
            raise ConfigError(f"an option in {source} must come once; got {name} twice, as {given} too; delete one")
        values[name] = _read_value(given, value, fields[name], source)
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise ConfigError(f"options in {source} must have the types of the command line's; got {error}") from error


def _read_value(name: str, value: Any, kind: Any, source: str) -> Any:
    """An option out of a file, with a path where it is one, and a tuple for a list.

    Raises ConfigError where it must be text and is not.
    """
    if typing.get_origin(kind) is tuple:
        return tuple(value) if isinstance(value, list) else value
    kinds = typing.get_args(kind) or (kind,)  # of str | None, of Literal["own", "shared"]
    text = Path in kinds or str in kinds or all(isinstance(choice, str) for choice in kinds)
    if text and not isinstance(value, str) and not (value is None and types.NoneType in kinds):
        option = name.replace("_", "-")
        raise ConfigError(f"{option} in {source} must be a text; got {value!r}; write it in quotes")
    if Path in kinds and value is not None:
        return Path(value)
    return value


def read_config_file(path: Path) -> dict[str, Any]:
    """The table in a TOML or JSON file; a run's own config.json counts."""
    import tomllib

    try:
        text = path.read_text(encoding="utf-8")
        data = parsed(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"a configuration file must exist; {path} does not") from error
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} must be TOML or JSON; it cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a table of options; got {type(data).__name__}; write name and value pairs")
    options = data.get("config", data)
    if not isinstance(options, dict):
        raise InputError(f"config in {path} must be a table of options; got {options!r}; write name and value pairs")
    return options
