"""A long run keeps nothing of its steps: its memory is that of the first ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from small_runs import small_world

STEPS, ROLLOUTS = 500, 10_000
MOST_MB = 12.0
"""What may grow: the metrics of each step that warnings are made of, 4 KB a step, and the heap's fragments."""

RUN = """
import json, sys
from turnwise import training
options, leak = json.loads(sys.argv[1]), sys.argv[2] == "leak"
kept, pages, draw = [], [], training.draw

def drawn(*given, **named):
    groups = draw(*given, **named)
    if leak:
        kept.append(groups)
    return groups

class Seen:
    def show(self, record):
        if record["split"] == "train":
            pages.append(int(open("/proc/self/statm").read().split()[1]))
    def say(self, text): ...

training.draw = drawn
training.train(**options, display=Seen())
steps = len(pages)
megabytes = lambda part: sum(part) / len(part) * 4096 / 1e6
print(steps, megabytes(pages[-steps // 10 :]) - megabytes(pages[steps // 5 : steps // 5 + steps // 10]))
"""

REWARDS = '''
def outcome_varied(task, rollout):
    """Different for different rollouts."""
    return sum(rollout.turns[-1].action_ids) % 97 / 97
'''


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("leak", "steps"), [(False, STEPS), (True, STEPS // 2)])
def test_memory_is_flat_over_500_steps_and_10_000_rollouts(tmp_path: Path, checkpoint: Path, leak: bool, steps: int):
    import json

    options = {
        **small_world(tmp_path, checkpoint, "abcdef", REWARDS),
        "out": tmp_path / "run",
        "steps": steps,
        "tasks_per_step": 2,
        "minibatches": 1,
        "group_size": ROLLOUTS // STEPS // 2,
        "max_turn_tokens": 16,
        "validation_size": 1,
        "validate_every": steps,
        "checkpoint_every": steps,
        "threads": 1,
    }
    given = json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in options.items()})
    command = [sys.executable, "-W", "ignore", "-c", RUN, given, "leak" if leak else "flat"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    seen, growth = done.stdout.split()
    assert int(seen) == steps
    assert (float(growth) > MOST_MB) == leak
