"""A run's policy as a plain checkpoint, for whatever reads models: an adapter is merged into its base model."""

from pathlib import Path

from turnwise.errors import InputError
from turnwise.evaluation import Checkpoint, run_policy
from turnwise.lora import is_adapted, merge_adapter
from turnwise.policy import save_policy
from turnwise.rundir import writing


def export(run: str | Path, out: str | Path, *, checkpoint: Checkpoint = "best") -> Path:
    """Writes the policy of a run, or of a checkpoint folder, to the new folder `out`, which `transformers` loads.

    With the tokenizer, chat template and generation configuration that the run's start had. Raises InputError where
    `out` holds files, InputError or RunError where there is no such run or checkpoint.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out must name a new or empty folder; {out} holds files; choose another")
    policy, _ = run_policy(run, checkpoint)
    if is_adapted(policy.model):
        merge_adapter(policy.model)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        save_policy(policy, out)
    return out
