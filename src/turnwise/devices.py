"""Where a model computes, and in which numbers: its device, the dtype of its weights, mixed precision, recomputation.

Losses and log-probabilities are float32 whatever the weights are. Whatever makes tensors for a model makes them on
`model.device`.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from turnwise.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "mixed"]
Device = Literal["auto", "cpu", "cuda", "mps"]

SMALL = 20_000_000
"""Parameters below which a model's operations are too short to be shared among threads, or worth a GPU."""
M_MMAP_THRESHOLD = -3
"""`mallopt`'s name, from glibc's malloc.h, of the size from which a block is the system's own and returns to it."""
RETURNED_BYTES = 2**18


def num_parameters(model: torch.nn.Module) -> int:
    """Parameters, those used twice counted once."""
    return sum(p.numel() for p in model.parameters())


def is_offered(name: Device) -> bool:
    """Whether torch offers the device on this machine."""
    return {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(name, lambda: True)()


def check_device(name: Device) -> None:
    """Raises ConfigError for a device that torch does not offer on this machine."""
    if not is_offered(name):
        offered = " or ".join(kind for kind in ("cuda", "mps", "cpu") if is_offered(kind))
        raise ConfigError(
            f"device must be one that torch offers on this machine; got {name}; take {offered}, or leave it out"
        )


def chosen_device(name: Device, model: torch.nn.Module) -> torch.device:
    """The device of that name; for `auto` a GPU where there is one, unless the model is small."""
    if name != "auto":
        return torch.device(name)
    small = num_parameters(model) < SMALL
    return torch.device("cpu" if small else next(kind for kind in ("cuda", "mps", "cpu") if is_offered(kind)))


def placed(
    model: PreTrainedModel, *, device: Device = "auto", dtype: Dtype = "float32", recompute: bool = False
) -> PreTrainedModel:
    """The model, moved to its device and dtype; `mixed` keeps float32 weights and computes in bfloat16.

    With `recompute`, each layer's activations are computed again in the backward pass instead of being kept.
    """
    for parameter, kept in weight_dtypes(model, dtype):  # and no buffers: a rotary frequency would be another one
        parameter.data = parameter.data.to(kept)
    chosen = chosen_device(device, model)
    model.to(chosen)  # pyright: ignore[reportArgumentType]
    if chosen.type == "cpu" and num_parameters(model) >= SMALL:
        give_back_freed()
    set_computation(model, dtype=dtype, recompute=recompute)
    return model


@functools.cache
def give_back_freed() -> None:
    """Makes this process's freed tensors the system's again at once, where its allocator is glibc's.

    By itself it keeps blocks of up to 32 MiB for later, between which large ones do not fit: up to a quarter of a large
    model's peak, for a tenth of its time (docs/memory.md).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, or another allocator
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)


def weight_dtypes(model: PreTrainedModel, dtype: Dtype) -> list[tuple[torch.nn.Parameter, torch.dtype]]:
    """What each weight is kept in. Adapters, which learn alone, stay in float32: they are small and cast inputs."""
    weights = list(model.parameters())
    whole = all(p.requires_grad for p in weights)
    small = dtype == "bfloat16"
    return [(p, torch.bfloat16 if small and (whole or not p.requires_grad) else torch.float32) for p in weights]


def set_computation(model: PreTrainedModel, *, dtype: Dtype, recompute: bool) -> None:
    """How a model whose weights are in place computes."""
    vars(model).update(_turnwise_mixed=dtype == "mixed", _turnwise_recompute=recompute)


def computing(model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within, the model's operations run in bfloat16 where it is mixed; elsewhere nothing changes."""
    if not is_mixed(model):
        return contextlib.nullcontext()
    # Casts are not kept: they would outlive an optimiser step.
    return torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, cache_enabled=False)


def is_mixed(model: torch.nn.Module) -> bool:
    """Whether the model's weights are float32 and its operations bfloat16."""
    return getattr(model, "_turnwise_mixed", False)


def compute_dtype(model: torch.nn.Module) -> torch.dtype:
    """What the model's attention computes in."""
    return torch.bfloat16 if is_mixed(model) else next(model.parameters()).dtype


@contextlib.contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Within, layers of a model that is set to it keep their inputs alone, and compute again in the backward pass.

    One thread at a time may be within, for a model.
    """
    if not getattr(model, "_turnwise_recompute", False) or not torch.is_grad_enabled():
        yield
        return
    layers: Any = model.get_decoder().layers
    before = [(layer, vars(layer).pop("forward", None)) for layer in layers]
    try:
        for layer, own in before:
            forward = own or layer.forward
            layer.forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, own in before:
            del layer.forward
            if own is not None:
                layer.forward = own


def device_memory(device: torch.device) -> int | None:
    """How many bytes the device has; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if not hasattr(os, "sysconf"):
        return None
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [_limit(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    return min(machine, *(limit for limit in limits if limit)) if any(limits) else machine


def _limit(file: Path) -> int | None:
    """A container's limit, where the file says one."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
