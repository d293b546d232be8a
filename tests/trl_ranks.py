"""One of two processes whose groups of rollouts span both; writes its rows' advantages of every estimator.

For test_adapters_trl.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

from adapter_rollouts import awkward_rollouts
from test_adapters_trl import GROUP, batch_inputs, fixed_trainer
from turnwise.adapters.rows import WITHOUT_CRITIC


def main(checkpoint: str, out: str) -> None:
    warnings.simplefilter("ignore")
    found = {name: advantages(name, Path(checkpoint), Path(out)) for name in WITHOUT_CRITIC}
    rank = torch.distributed.get_rank()
    (Path(out) / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def advantages(estimator: str, checkpoint: Path, out: Path) -> list[list[float]]:
    """Those of this process's rows, at their sampled tokens."""
    step = awkward_rollouts(3, GROUP, singleton=False, seed=5)
    own = fixed_trainer(step, checkpoint, out, estimator=estimator, per_device_train_batch_size=len(step) // 2)
    rank = own.accelerator.process_index
    cut = slice(rank * len(step) // 2, (rank + 1) * len(step) // 2)
    given = own.rollout_func

    def of_this_process(prompts: object, trainer: object) -> dict:
        columns = given(prompts, trainer)
        return {name: column if column is None else column[cut] for name, column in columns.items()}

    own.rollout_func = of_this_process
    own.model.train()
    batch = own._generate_and_score_completions(batch_inputs(step[cut]))
    mask = (batch["completion_mask"] * batch["tool_mask"]) > 0
    return [row[there].tolist() for row, there in zip(batch["advantages"], mask, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
