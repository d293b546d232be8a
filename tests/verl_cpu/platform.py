"""verl without an accelerator, for the tests: a CPU platform, named by VERL_PLATFORM=cpu.

verl imports this at the beginning of every process (VERL_USE_EXTERNAL_MODULES=verl_cpu.platform).
VERL_ENGINE_DEVICE=cuda makes it take its FSDP engine, which is registered for accelerators alone; `rollout` brings an
inference server.
"""

import contextlib
import types
from typing import Any

import torch
from transformers import AutoModelForTokenClassification
from verl.plugin.platform import PlatformBase, PlatformRegistry


def nothing(*_: Any, **__: Any) -> None:
    pass


DEVICE: Any = types.SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: "cpu",
    set_device=nothing,
    synchronize=nothing,
    empty_cache=nothing,
    manual_seed=nothing,
    ipc_collect=nothing,
    max_memory_allocated=lambda: 0,
    max_memory_reserved=lambda: 0,
    memory_allocated=lambda: 0,
    memory_reserved=lambda: 0,
    mem_get_info=lambda: (0, 0),
    get_device_name=lambda: "cpu",
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
)
"""What verl asks of torch.cuda."""


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """One CPU as an accelerator, with gloo between processes; Ray counts it as a GPU, which placement asks for."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = DEVICE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return contextlib.nullcontext()

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


_init_process_group = torch.distributed.init_process_group


def init_process_group(backend: str | None = None, **options: Any) -> None:
    """torch's, with "cpu:gloo" named once: verl writes a backend for the CPU and one for its device."""
    return _init_process_group("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **options)


torch.distributed.init_process_group = init_process_group


_value_model = AutoModelForTokenClassification.from_pretrained


def value_model(*args: Any, **options: Any) -> Any:
    """A critic's model, for which verl demands flash attention."""
    return _value_model(*args, **{**options, "attn_implementation": "eager"})


AutoModelForTokenClassification.from_pretrained = staticmethod(value_model)
