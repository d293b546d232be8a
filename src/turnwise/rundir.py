"""The run directory: everything a run leaves behind, written so that a crash never leaves a torn file as good.

    config.json                 the resolved configuration, before the first step
    metrics.jsonl               one line per step and split
    rollouts.jsonl              recorded rollouts with their credit
    checkpoints/step-000020/    a policy, or an adapter alone, that `transformers` loads, the optimiser, the critic and
                                its optimiser where there is one, state.json and SHA256SUMS
    best/                       the policy of the best validation so far, and SHA256SUMS
    bad/step-000021-1-2/        a batch whose loss or gradient was not finite (pass 1, minibatch 2)
    eval-NAME.json              evaluations
    tensorboard/, wandb/,       what a tracker keeps there
    tracker.json
    report.html

All random draws are functions of the run's seed and the step, so the step is the whole random state.

What stands under one of these names is whole: files and folders are written under a hidden name, put on the disk, and
renamed. Lines are added in one piece that is taken back where it fails, and a line that a crash tore is dropped.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import turnwise
from turnwise.batch import Row
from turnwise.checksums import CHECKSUMS, changed, damage, sync, write_checksums
from turnwise.config import TrainConfig, config_from_dict, config_to_dict
from turnwise.critic import Critic
from turnwise.errors import RunError
from turnwise.policy import Policy, save_policy
from turnwise.records import parsed
from turnwise.trust import check_links, check_own, seal_of

FORMAT = 1
STATE_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "step": int,
    "best": (int, float),
    "wall_s": (int, float),
    "validation": dict,
}
"""What a checkpoint's state must hold for training to go on."""
KEPT_CHECKPOINTS = 2
TRACKER_FILE = "tracker.json"
BEFORE_A_STEP = {"config.json", "metrics.jsonl", "best", "tensorboard", "wandb", TRACKER_FILE}
"""What a run can leave before its first step."""
OPTIMIZER, CRITIC, CRITIC_OPTIMIZER, SAMPLER = (
    f"{name}.safetensors" for name in ("optimizer", "critic", "critic_optimizer", "sampler")
)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write (full disk, no permission) into a RunError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        if isinstance(error, RunError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"the run directory must be writable and have room; writing {path} failed: {reason}; free space or "
            "choose another --out; what was written before is kept"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content in one step."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        if partial.is_symlink():  # what it leads to is not ours
            partial.unlink()
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)


def create_run(path: Path, config: TrainConfig) -> None:
    """Makes the directory and writes config.json. Raises RunError where a run is there already.

    A run that took no step, as its options were wrong, is not in the way.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if _took_no_step(path):
            shutil.rmtree(path)
            path.mkdir()
        used = any(entry.name != ".config.json.partial" for entry in path.iterdir())  # that one, a stop has left
    if used:
        raise RunError(
            f"--out must name a new or empty directory; {path} holds files; choose another, or continue the run in it "
            "with --resume"
        )
    write_config(path, config)


def _took_no_step(path: Path) -> bool:
    """Whether all that stands in a folder is what a run leaves there before its first step."""
    found = {entry.name for entry in path.iterdir()}
    if "config.json" not in found or not found <= BEFORE_A_STEP:
        return False
    return "metrics.jsonl" not in found or all(record.get("step") == 0 for record in read_lines(path / "metrics.jsonl"))


def write_config(path: Path, config: TrainConfig) -> None:
    """Writes config.json, sealed as this user's."""
    options = config_to_dict(config)
    record = {"format": FORMAT, "turnwise": turnwise.__version__, "config": options, "seal": seal_of(_sealed(options))}
    write_atomically(path / "config.json", json.dumps(record, indent=2) + "\n")


def _sealed(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def read_config(path: Path, *, plays: bool = False) -> TrainConfig:
    """The configuration of a run.

    Who `plays` it executes the code that it names: RunError where a stranger may have made it.
    """
    check_links(path)
    file = path / "config.json"
    try:
        record = parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} must be a run directory; its config.json cannot be read ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise RunError(f"{path} must be a run directory; its config.json holds no configuration; name a run")
    if record.get("format") != FORMAT:
        raise RunError(
            f"{file} must have format {FORMAT}; got {record.get('format')!r:.60}; use the version of turnwise that "
            f"wrote it ({record.get('turnwise', 'unknown')})"
        )
    config = config_from_dict(record["config"], str(file))
    if plays:
        check_own(path, _sealed(record["config"]), record.get("seal"), config)
    return config


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds records to a JSON-lines file: all of them, or none where that fails.

    ASCII, so that any text comes through.
    """
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if not content:
        return
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(content)
            while rest:  # a disk that fills up takes a part
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # a device has no length
                file.truncate(before)
            raise


def cut_lines(path: Path, *, after_step: int) -> None:
    """Drops the records of later steps, and what a crash left of a last line, before a run is continued.

    Warns of a line that is no JSON and not the last one. Raises RunError for a line that is JSON but no record of a
    step.
    """
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parsed(line)
        except ValueError:
            if line and any(lines[number:]):
                warnings.warn(f"{path.name}:{number} is damaged and was dropped: {line[:60]}", stacklevel=2)
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise RunError(
                f"{path}:{number} must hold a JSON object with a step; got {line[:60]}; repair or delete the line"
            )
        if record["step"] <= after_step:
            kept.append(line + "\n")
    if "".join(kept) != text:
        write_atomically(path, "".join(kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, without a last line that a crash left half-written; none without a file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    with contextlib.suppress(ValueError):
        return [parsed(line) for line in lines]
    return [parsed(line) for line in lines[:-1]]


def missing_lines(path: Path, records: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The records that a file, whose last ones may be the first of them, still lacks."""
    there = read_lines(path)
    number = next(n for n in range(len(records), -1, -1) if there[len(there) - n :] == list(records[:n]))
    return records[number:]


KEPT_BAD = 5
"""How many batches that were not finite a run keeps: the first ones, which tell most."""


def save_bad_batch(
    run: Path, step: int, place: tuple[int, int], rows: Sequence[tuple[int, Row]], fault: Mapping[str, Any]
) -> Path | None:
    """Writes a batch whose loss or gradient was not finite, to be looked into; None where there are enough already.

    `batch.safetensors` has the rows one after the other: their tokens and what belongs to each of these, and per row
    its group, share and lengths; `batch.json` says what was wrong.
    """
    folder = run / "bad" / "-".join(["step", f"{step:06d}", *(str(number + 1) for number in place)])
    if len(list((run / "bad").glob("step-*"))) >= KEPT_BAD and not folder.exists():
        return None
    with writing(folder):
        partial = _fresh(folder.with_name(f".{folder.name}.partial"))
        save_file(_row_tensors(rows), partial / "batch.safetensors")
        record = {"step": step, "pass": place[0] + 1, "minibatch": place[1] + 1, **fault}
        (partial / "batch.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _put_in_place(partial, folder)
    return folder


def _row_tensors(rows: Sequence[tuple[int, Row]]) -> dict[str, torch.Tensor]:
    """Rows as flat columns."""
    own = [row for _, row in rows]
    columns: dict[str, Any] = {
        "group": [group for group, _ in rows],
        "share": [row.share for row in own],
        "prompt_lengths": [len(row.prompt_ids) for row in own],
        "lengths": [len(row.ids) for row in own],
        "prompt_ids": [token for row in own for token in row.prompt_ids],
        "ids": [token for row in own for token in row.ids],
    }
    for name in ("action", "loss", "sampling_logprobs", "advantages", "values", "returns"):
        parts = [getattr(row, name) for row in own]
        if all(part is not None for part in parts):
            columns[name] = np.concatenate(parts)
    return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}


# --- checkpoints ------------------------------------------------------------------------------------


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    run: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    critic: Critic | None = None,
    sampler: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a checkpoint that a run can continue from, and drops all but the newest few.

    `sampler` are the weights that draw the next step's rollouts, where they are not the policy's.
    """
    folder = checkpoint_folder(run, step)
    with writing(folder):
        partial = _fresh(folder.with_name(f".{folder.name}.partial"))
        save_policy(policy, partial)
        save_file(_optimizer_tensors(optimizer), partial / OPTIMIZER)
        if critic:
            save_file(critic.state(), partial / CRITIC)
            save_file(_optimizer_tensors(critic.optimizer), partial / CRITIC_OPTIMIZER)
        if sampler:
            save_file(dict(sampler), partial / SAMPLER)
        record = {"format": FORMAT, "step": step, **state}
        (partial / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _put_in_place(partial, folder)
        _remove_old(folder)
    return folder


def _remove_old(newest: Path) -> None:
    """Removes all checkpoints but the newest few up to one."""
    up_to_this = [f for f in sorted(newest.parent.glob("step-*")) if f.name <= newest.name]
    for old in up_to_this[:-KEPT_CHECKPOINTS]:
        _remove(old)


def save_best(run: Path, policy: Policy) -> None:
    """Writes the policy of the best validation so far."""
    with writing(run / "best"):
        partial = _fresh(run / ".best.partial")
        save_policy(policy, partial)
        _put_in_place(partial, run / "best")


def best_folder(run: Path) -> Path | None:
    """The policy of the best validation, where there is one: also where a crash came while it was being replaced."""
    return next((folder for folder in (run / "best", _outgoing(run / "best")) if folder.is_dir()), None)


def chosen_checkpoint(run: Path, *, best: bool) -> Path:
    """The folder of a run's best policy, or of its newest; a damaged one is named, and the newest whole one taken."""
    folder = best_folder(run) if best else None
    fault = damage(folder) if folder else None
    if folder and not fault:
        return folder
    newest = latest_checkpoint(run)[0]
    if fault:
        warnings.warn(f"passed over the damaged best policy ({fault}); {newest.name} is played instead", stacklevel=2)
    return newest


def drop_after(run: Path, step: int) -> None:
    """Removes later checkpoints, which are damaged and whose steps will be taken anew, and what a crash left."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    with writing(run):
        for folder in (f for f in folders if f.name > checkpoint_folder(run, step).name):
            _remove(folder)
        _remove_old(checkpoint_folder(run, step))
        if (run / "best").is_dir():
            for left in (_outgoing(run / "best"), run / ".best.partial"):
                shutil.rmtree(left, ignore_errors=True)
        for left in (run / "checkpoints").glob(".step-*"):
            shutil.rmtree(left)


def latest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint and its state; damaged ones are passed over with a warning that names them."""
    damaged = []
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        fault, state = _checkpoint_state(folder)
        if state is not None:
            if damaged:
                warnings.warn(
                    f"passed over a damaged checkpoint: {', '.join(damaged)}; {folder.name} is whole", stacklevel=2
                )
            return folder, state
        damaged.append(f"{folder.name} ({fault})")
    what = f"damaged: {', '.join(damaged)}" if damaged else "there is none"
    raise RunError(f"{run} must hold a whole checkpoint; {what}; start the run anew in another directory")


def _checkpoint_state(folder: Path) -> tuple[str, dict[str, Any] | None]:
    try:
        state = parsed((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            return f"format {state['format']!r}, not {FORMAT}", None
        fault = _checkpoint_damage(folder, state)
        if fault:
            return fault, None
        for name, kind in STATE_FIELDS.items():
            if not isinstance(state[name], kind):
                return f"its {name} is {state[name]!r}", None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}", None
    return "", state


def _checkpoint_damage(folder: Path, state: Mapping[str, Any]) -> str | None:
    """As `damage`; earlier checkpoints have their checksums in the state."""
    if (folder / CHECKSUMS).exists():
        return damage(folder)
    if "sha256" not in state:
        return f"{CHECKSUMS} is missing"
    return next(filter(None, (changed(folder / name, expected) for name, expected in state["sha256"].items())), None)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, name: str = OPTIMIZER) -> None:
    """Puts a checkpoint's optimiser state into a fresh optimiser of the same parameters."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in _tensors(folder / name, "the optimiser's state").items():
        index, entry = key.split(".")
        state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_critic(critic: Critic, folder: Path) -> None:
    """Puts a checkpoint's critic, weights and optimiser, into a fresh one of the same kind."""
    critic.load_state(_tensors(folder / CRITIC, "the critic"))
    load_optimizer(critic.optimizer, folder, CRITIC_OPTIMIZER)


def load_sampler(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that draw the next step's rollouts."""
    return _tensors(folder / SAMPLER, "the weights that draw ahead")


def _tensors(file: Path, what: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file.parent} must hold {what}; it cannot be read ({error})") from error


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _put_in_place(partial: Path, folder: Path) -> None:
    """Gives a finished folder its name. At every moment it is whole, or what it replaces is, under `_outgoing`."""
    write_checksums(partial)
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    outgoing = _outgoing(folder)
    if folder.exists():
        shutil.rmtree(outgoing, ignore_errors=True)
        folder.replace(outgoing)
    partial.replace(folder)
    sync(folder.parent)
    shutil.rmtree(outgoing, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Removes a folder, of which no part is ever left under its name."""
    outgoing = _outgoing(folder)
    shutil.rmtree(outgoing, ignore_errors=True)
    folder.replace(outgoing)
    shutil.rmtree(outgoing, ignore_errors=True)


def _outgoing(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
