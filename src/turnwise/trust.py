"""Which runs are this user's own: a stranger's may name code, and whoever plays it would execute that.

Every run's config.json is sealed with a key that stands in the user's configuration folder and in no run. A link in a
run's folder could have another file read, or written, in its place: none may lead out.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from turnwise.config import TrainConfig
from turnwise.errors import RunError

TRUST = "TURNWISE_TRUST"
"""The environment variable that says, as 1, that the code which runs name has been read."""
WANDB = "wandb"
"""The folder in a run that a tracker keeps for itself."""
KEY_BYTES = 32
PLAIN_TOOLS = ("search", "calculator", "python")


def named_code(config: TrainConfig) -> list[str]:
    """What playing a run would execute: its options that name Python files or commands, as `option = value`."""
    tools = [part.strip() for part in (config.tools or "").split(",")]
    found = [f"tools = {part}" for part in tools if part and part not in PLAIN_TOOLS]
    found += [f"rewards = {config.rewards}"] if config.rewards else []
    environment = config.environment or ""
    return found + ([f"environment = {environment}"] if environment.endswith(".py") else [])


def check_own(path: Path, content: str, seal: object, config: TrainConfig) -> None:
    """RunError where a run names code and was not written here by this user, nor is said to be trusted."""
    code = named_code(config)
    if not code or os.environ.get(TRUST) == "1" or (isinstance(seal, str) and _is_own(content, seal)):
        return
    raise RunError(
        f"{path} must be a run that you made here, as playing it executes what it names; it is from elsewhere, or its "
        f"config.json was edited, and it has {', '.join(code)}; read that, then set {TRUST}=1"
    )


def check_links(run: Path) -> None:
    """RunError where something in a run's folder is a link that leads out of it, or neither a file nor a folder."""
    if os.environ.get(TRUST) == "1":
        return
    root = run.resolve()
    for folder, folders, files in os.walk(root):
        if Path(folder) == root / WANDB:  # which links to its logs elsewhere; we read and write nothing there
            folders.clear()
            continue
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                fault = f"a link to {os.readlink(path)}; remove it, or set {TRUST}=1 if you made it"
            elif path.exists() and not path.is_file() and not path.is_dir():
                fault = "a pipe or a device; remove it"
            else:
                continue
            raise RunError(f"{run} must hold files of its own alone; {path.relative_to(root)} is {fault}")


def seal_of(content: str) -> str | None:
    """The seal of a text; None where the user has no folder for the key."""
    try:
        return hmac.new(_key(), content.encode(), hashlib.sha256).hexdigest()
    except OSError:
        return None


def _is_own(content: str, seal: str) -> bool:
    own = seal_of(content)
    return own is not None and hmac.compare_digest(own.encode(), seal.encode())


def _key() -> bytes:
    """The user's key, made where there is none. OSError where it can be neither read nor written, or is none."""
    file = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "turnwise" / "key"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"key-{secrets.token_hex(8)}")
        partial.touch(mode=0o600)
        partial.write_bytes(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(partial, file)  # of two processes that make one, the first stands
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    key = file.read_bytes()
    if len(key) < KEY_BYTES:
        raise OSError(f"{file} is no key")  # one that anybody could guess
    return key
