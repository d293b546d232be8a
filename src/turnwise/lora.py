"""LoRA: a product of two small matrices beside each of a model's linear layers is learned, the model itself stays.

    y = W x + (alpha / rank) B A x        A (rank, in) random, B (out, rank) zero at first

so a run begins at exactly its base model ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)). The layers come from
`peft` and sit inside the model, which remains what `transformers` made it. Without them it is the base model, so the
reference of a KL term needs no second copy.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from turnwise.errors import ConfigError, RunError

ALL_LINEAR = "all-linear"
"""peft's name for every linear layer but the output layer."""


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether the model carries an adapter; only that is saved, and learned, then."""
    return getattr(model, "_hf_peft_config_loaded", False)


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    base: str,
    revision: str | None = None,
) -> None:
    """Puts a fresh adapter, a function of the seed, beside layers of the model, and freezes everything else.

    `targets` are names of modules, or their ends; none stands for every linear layer but the output layer. Checkpoints
    will name `base` as what the adapter belongs to. Raises ConfigError for a name that no linear layer has.
    """
    from peft import LoraConfig

    _check_targets(model, targets)
    model.name_or_path = base
    wanted = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # peft divides it by the rank, whole or not
        lora_dropout=0.0,
        target_modules=list(targets) or ALL_LINEAR,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(wanted)


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Raises ConfigError for a target that is no linear layer, or shares its weights with another layer."""
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    for target in targets:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"lora-targets must be linear layers of the policy; it has none called {target!r}; take some of "
                f"{', '.join(ends)}"
            )
        if head in found and model.config.tie_word_embeddings:
            raise ConfigError(
                f"lora-targets must have weights of their own; {target} is this policy's embedding too; leave it out"
            )


def load_adapter(model: PreTrainedModel, folder: Path, *, base: str) -> None:
    """Puts a saved adapter into its base model, ready to learn on. RunError where it is damaged or does not fit."""
    import peft  # noqa: F401  # without it, the error should name it

    model.requires_grad_(False)
    conversions = getattr(model, "_weight_conversions", None)
    try:
        found = model.load_adapter(str(folder), is_trainable=True)
    except Exception as error:  # safetensors, json, peft and transformers each raise their own
        raise RunError(
            f"adapter {folder} must be whole and fit its base model {base}; it cannot be read "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); use another checkpoint of the run"
        ) from error
    if found.missing_keys:
        raise RunError(
            f"adapter {folder} must be whole; it lacks {sorted(found.missing_keys)[0]} and "
            f"{len(found.missing_keys) - 1} other tensors; use another checkpoint of the run"
        )
    own: Any = model
    own._weight_conversions = conversions  # the names of weights on disk are the model's again, not the adapter's
    own.name_or_path = base
    settings: Any = model.peft_config["default"]
    if getattr(settings, "modules_to_save", None):
        raise ConfigError(
            f"adapter {folder} must hold products beside layers alone; it holds whole layers too "
            f"({', '.join(settings.modules_to_save)}); merge it with peft first"
        )
    settings.base_model_name_or_path = base


@contextlib.contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model is its base model. No other thread may use it meanwhile."""
    if not is_adapted(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def merge_adapter(model: PreTrainedModel) -> None:
    """Adds the adapter's products to the weights beside them; what is left is a plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            above, _, own = name.rpartition(".")
            setattr(model.get_submodule(above), own, module.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
    model.requires_grad_(True)
