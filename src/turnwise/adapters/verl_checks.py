"""The checks of `turnwise doctor verl`: packages, the plugin here and in Ray's workers, a batch with known credit."""

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

from turnwise.adapters.doctor import Finding, installed, of_release

RANGE = ("0.9", "0.10")
"""The releases of verl that the adapter is for, the second one not included."""
INSTALL = 'pip install "turnwise[verl]"'
PACKAGES = ("torch", "transformers", "tensordict", "ray", "TransferQueue", "verl")
NAME = "turnwise/mt-grpo"
WORKER_S = 300
"""How long a worker on another node may take to start and to import verl."""


def packages() -> Finding:
    """The packages are installed."""
    return installed(PACKAGES, install=INSTALL)


def releases() -> Finding:
    """The release of verl is one that the adapter is for."""
    return of_release("verl", *RANGE)


def imports() -> Finding:
    """verl's trainer, its agent loops and ours can be imported."""
    try:
        for module in ("verl", "verl.trainer.ppo.v1", "turnwise.adapters.verl_loops"):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        return Finding(
            what=f"verl needs {missing}, which is not installed", fix=f'pip install "verl[verl-core]" {missing}'
        )
    return Finding(what="verl's trainer, its agent loops and ours can be imported")


def entry_point() -> Finding:
    """verl finds the plugin."""
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if policy.strip().lower() != "auto" and "turnwise" not in policy.split(","):
        return Finding(
            what=f"VERL_USE_EXTERNAL_PLUGINS is {policy!r}, so that verl does not load the plugin",
            fix="unset VERL_USE_EXTERNAL_PLUGINS  # or add turnwise to its list, on every node",
        )
    if "turnwise" not in {point.name for point in importlib.metadata.entry_points(group="verl.plugins")}:
        return Finding(
            what="turnwise's installation has no entry point in the group verl.plugins; a folder on a path has none",
            fix="pip install --force-reinstall --no-deps turnwise  # from a checkout: pip install -e .",
        )
    return Finding(what="verl finds the plugin turnwise in the group verl.plugins")


def registered() -> Finding:
    """The estimators are in verl's registry."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    if NAME not in ADV_ESTIMATOR_REGISTRY:
        try:
            importlib.import_module("turnwise.adapters.verl_plugin")
        except Exception as error:
            return Finding(
                what=f"the plugin fails, and verl does not say so: {type(error).__name__}: {error}", fix=INSTALL
            )
        return Finding(
            what=f"{NAME} was not registered by `import verl`, though the plugin can be imported",
            fix="VERL_USE_EXTERNAL_MODULES=turnwise.adapters.verl_plugin  # in the environment of every node",
        )
    count = sum(name.startswith("turnwise/") for name in ADV_ESTIMATOR_REGISTRY)
    return Finding(what=f"{count} estimators are in verl's registry, {NAME} among them")


def a_batch() -> Finding:
    """A batch with known rewards gets known credit from verl's compute_advantage."""
    import numpy as np

    rows = _outputs([[1.0], [0.0], [1.0], [0.0]])
    batch = _batch(rows)
    arrived = batch.batch["token_level_rewards"][:, 1].tolist()
    if arrived != [1.0, 0.0, 1.0, 0.0]:
        return Finding(
            what=f"turn rewards do not arrive on the turns' last tokens: they are 1, 0, 1, 0; verl has {arrived}",
            fix='pip install "verl==0.9.1"  # the agent loop\'s output changed',
        )
    from omegaconf import OmegaConf
    from verl.trainer.ppo.ray_trainer import compute_advantage

    config = OmegaConf.create({"turnwise": {"alpha": 1.0}, "use_kl_in_reward": False})
    found = compute_advantage(batch, adv_estimator=NAME, config=config).batch["advantages"]
    # In the group of four: z = ±½ / (0.577 + 1e-4) on the first turns, 0 on the second ones, whose outcomes are equal.
    z = 0.5 / (np.std([1, 0, 1, 0], ddof=1) + 1e-4)
    first, second = found[:, 0].tolist(), found[:, 4].tolist()
    if not np.allclose(first, [z, -z, z, -z], atol=1e-5) or not np.allclose(second, 0.0, atol=1e-6):
        return Finding(
            what=f"turns must get ±{z:.3f} and 0; the first got {first}, the second {second}",
            fix='pip install "verl==0.9.1"  # the trainer changed what it does with a batch',
        )
    return Finding(what=f"turn rewards arrive; advantages differ between turns ({first[0]:+.3f} and {second[0]:+.3f})")


def _outputs(turn_rewards: Any) -> list[dict[str, Any]]:
    """What our agent loops hand to verl for two-turn rollouts with these rewards."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics

    from turnwise.adapters.verl_loops import TurnOutput

    return [
        TurnOutput(
            prompt_ids=[5, 6],
            response_ids=[7, 8, 9, 10, 11, 2],
            response_mask=[1, 1, 0, 0, 1, 1],
            reward_score=0.5,
            metrics=AgentLoopMetrics(),
            turn_rewards=turns,
        ).as_dict()
        for turns in turn_rewards
    ]


def _batch(rows: list[dict[str, Any]]) -> Any:
    """verl's batch of rows of one group."""
    import numpy as np
    import torch
    from verl import DataProto

    tensors = {
        "token_level_rewards": torch.stack([row["rm_scores"] for row in rows]),
        "response_mask": torch.stack([row["response_mask"] for row in rows]),
    }
    return DataProto.from_dict(tensors, non_tensors={"uid": np.array(["a"] * len(rows), dtype=object)})


def ray_workers() -> Finding:
    """Ray's workers have the estimators, on every node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    began = not ray.is_initialized()
    if began:
        cluster = os.environ.get("RAY_ADDRESS")
        ray.init(**({} if cluster else {"num_cpus": 1, "include_dashboard": False}), logging_level="ERROR")
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        remote = ray.remote(num_cpus=1)(estimators_here)
        asked = {
            node["NodeManagerHostname"]: remote.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for node in nodes
        }
        for host, answer in asked.items():
            names = ray.get(answer, timeout=WORKER_S)
            if NAME not in names:
                return Finding(
                    what=f"a Ray worker on {host} does not have {NAME} after `import verl`",
                    fix=f"{INSTALL}  # on {host}, in the environment of its Ray",
                )
    finally:
        if began:
            ray.shutdown()
    return Finding(what=f"Ray's workers have them on {len(asked)} node(s): {', '.join(asked)}")


def estimators_here() -> list[str]:
    """Our estimators in the registry of this process's verl."""
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    return [name for name in ADV_ESTIMATOR_REGISTRY if name.startswith("turnwise/")]


CHECKS: list[Callable[[], Finding]] = [packages, releases, imports, entry_point, registered, a_batch, ray_workers]
"""In this order: each builds on those before."""
