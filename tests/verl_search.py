"""The atlas's search task trained by verl from the policy that ships, on this machine's CPU, by verl's own main_ppo.

python tests/verl_search.py OUT [STEPS] [critic] [OVERRIDE ...]

Writes verl's metrics to OUT/metrics.jsonl and what the estimator found to OUT/turns.jsonl.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RANKS = 2

ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "verl_cpu.platform",
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",  # whose FSDP engine it takes
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # by default workers give way to everything else
    "TOKENIZERS_PARALLELISM": "false",
}


def overrides(out: Path, data: Path, policy: Path, steps: int) -> list[str]:
    """verl's configuration: above, what the adapter wants; below, what a CPU wants."""
    return [
        "algorithm.adv_estimator=turnwise/mt-grpo",
        f"+algorithm.turnwise.log={out / 'turns.jsonl'}",
        "actor_rollout_ref.model.external_lib=[turnwise.adapters.verl_loops,verl_cpu.rollout]",
        "actor_rollout_ref.rollout.agent.default_agent_loop=turnwise/environment",
        "+turnwise.max_turns=2",
        f"data.train_files={data / 'train.parquet'}",
        f"data.val_files={data / 'validation.parquet'}",
        "data.train_batch_size=8",
        "data.max_prompt_length=256",
        "data.max_response_length=384",
        "data.dataloader_num_workers=0",
        f"actor_rollout_ref.model.path={policy}",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=12",
        "actor_rollout_ref.actor.optim.lr=5e-4",
        "actor_rollout_ref.actor.optim.betas=[0.9,0.99]",
        "actor_rollout_ref.actor.grad_clip=0.5",
        "actor_rollout_ref.rollout.n=12",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=48",
        "trainer.logger=[console,file]",
        "trainer.val_before_train=False",
        f"trainer.n_gpus_per_node={RANKS}",
        f"trainer.total_training_steps={steps}",
        f"trainer.default_local_dir={out}",
        # what a CPU wants
        "actor_rollout_ref.rollout.name=turnwise_cpu",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.free_cache_engine=False",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "reward.num_workers=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "trainer.device=cpu",
        f"+ray_kwargs.ray_init.num_gpus={RANKS}",
        "ray_kwargs.ray_init.num_cpus=8",  # the queue's actor and the workers ask for one each
        "+ray_kwargs.ray_init.include_dashboard=False",
    ]


def critic(policy: Path) -> list[str]:
    """The trainer mode that hands values to our estimators, MT-PPO, and verl's critic on a CPU."""
    return [
        "algorithm.adv_estimator=turnwise/mt-ppo",
        "trainer.v1.trainer_mode=turnwise",
        "critic.enable=True",
        "critic.strategy=fsdp2",
        f"critic.model.path={policy}",
        "critic.model.use_remove_padding=False",
        "critic.model.enable_gradient_checkpointing=False",
        "+critic.model.override_config.attn_implementation=eager",
        "critic.optim.lr=1e-3",
        "critic.ppo_mini_batch_size=2",
        "critic.ppo_micro_batch_size_per_gpu=12",
        "critic.fsdp.model_dtype=fp32",
        "+critic.fsdp.mixed_precision.param_dtype=fp32",
        "critic.fsdp.use_torch_compile=False",
    ]


def main(out: str, steps: str = "6", *more: str) -> int:
    from turnwise.adapters.verl_data import write_dataset
    from turnwise.config import TrainConfig
    from turnwise.policy import embedded_checkpoint

    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_dataset(TrainConfig(max_turns=2), folder / "data")
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": path,
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
    }
    options = overrides(folder, folder / "data", Path(embedded_checkpoint()), int(steps))
    if "critic" in more:
        options += critic(Path(embedded_checkpoint()))
        environment["VERL_USE_EXTERNAL_MODULES"] += ",turnwise.adapters.verl_trainer"
    own = [option for option in more if option != "critic"]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *options, *own]
    return subprocess.run(command, env=environment, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
