"""An inference server for verl on a CPU: our in-process engine in a Ray actor per replica.

verl imports this where `actor_rollout_ref.model.external_lib` names it; `rollout.name=turnwise_cpu` takes it.
"""

from collections.abc import Iterable
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from turnwise.engine import Sampling
from turnwise.engines.hf import HFEngine
from turnwise.rollout import rollout_seed

NAME = "turnwise_cpu"


class Server:
    """Completions for a replica's requests, all of them in one batch."""

    def __init__(self, path: str, rank: int) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        context = int(self.model.config.max_position_embeddings)
        end = self.model.generation_config.eos_token_id or self.model.config.eos_token_id
        self.engine = HFEngine(self.model.eval(), stop_ids=[end], max_context=context)
        self.rank, self.steps, self.drawn = rank, 0, 0

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        self.drawn += 1
        sampling = Sampling(
            temperature=sampling_params["temperature"],
            max_tokens=sampling_params["max_tokens"],
            seed=rollout_seed(self.rank, self.drawn),
        )
        found = await self.engine.generate(prompt_ids, sampling, session=request_id)
        self.engine.release(request_id)
        return TokenOutput(
            token_ids=list(found.token_ids),
            log_probs=list(found.logprobs) if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.steps},
        )

    async def load(self, weights: dict[str, Any], steps: int) -> None:
        tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
        missing, unknown = self.model.load_state_dict(tensors, strict=False)
        assert not unknown, unknown
        assert set(missing) <= {"lm_head.weight"}, missing
        self.steps = steps
        self.engine.refresh(steps)

    async def nothing(self) -> None: ...


def server_name(rank: int) -> str:
    return f"{NAME}_{rank}"


class Replica(RolloutReplica):
    """One server."""

    async def launch_servers(self) -> None:
        actor = ray.remote(num_cpus=0, name=server_name(self.replica_rank))(Server)
        server: Any = actor.remote(self.model_config.path, self.replica_rank)
        await server.nothing.remote()
        self.servers, self._server_handle, self._server_address = [server], server, server_name(self.replica_rank)

    async def wake_up(self) -> None: ...

    async def sleep(self) -> None: ...


class Rollout(BaseRollout):
    """The trainer's side: sends whole weights to the replica of the same rank."""

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int = 0, **_: Any
    ) -> None:
        arrays = {name: tensor.detach().float().numpy() for name, tensor in weights}
        server: Any = ray.get_actor(server_name(torch.distributed.get_rank()))
        await server.load.remote(arrays, global_steps)


RolloutReplicaRegistry.register(NAME, lambda: Replica)
base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.Rollout"
