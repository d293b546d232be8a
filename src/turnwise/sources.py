"""Where a policy's files are: in a folder, or on the Hugging Face hub; and those to hand on with its weights.

No code that stands beside a model is ever run, and weights are read from safetensors alone.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from turnwise.errors import InputError

HANDED_ON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "generation_config.json",
)
"""What a checkpoint of a run takes over from the model that it began with, as it is."""
IS_MODEL, IS_ADAPTER = "config.json", "adapter_config.json"
"""The files by which a folder is a model, or an adapter without its base model."""
_UNREAD = ["*/*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.py"]
"""What is not fetched from the hub."""


def policy_folder(source: str | Path, *, names: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder with the files of `source`, and its revision where it is a model of the hub.

    `names` are what else the policy could be called, for the error: InputError where there is no such folder and the
    hub has no such model, or it is not downloaded and the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if any((folder / name).is_file() for name in (IS_MODEL, IS_ADAPTER)):
        return folder, None
    wanted = (
        f"policy must be {names}, a checkpoint folder with {IS_MODEL}, or a model of the Hugging Face hub (owner/name)"
    )
    if not is_hub_name(source):
        raise InputError(f"{wanted}; got {str(source)!r}")
    snapshot = _snapshot(str(source), wanted, revision)
    if not (snapshot / IS_MODEL).is_file() and not (snapshot / IS_ADAPTER).is_file():
        raise InputError(f"{wanted}; {source} of the hub has no {IS_MODEL}")
    return snapshot, snapshot.name


def is_hub_name(source: str | Path) -> bool:
    """Whether something is no folder here, but could be the name of a model of the hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) is not None and not Path(source).exists()


def _snapshot(name: str, wanted: str, revision: str | None) -> Path:
    """The folder of a hub's model, downloaded if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=_UNREAD))
    except GatedRepoError as error:
        why, cause = (
            "the hub gives it only to those who accepted its licence; accept it there, and `hf auth login`",
            error,
        )
    except RepositoryNotFoundError as error:
        why, cause = "it is no folder, and the hub has no such model, or it is private; check the spelling", error
    except LocalEntryNotFoundError as error:
        why = "it is no folder, and as a model it is not downloaded and the hub cannot be reached; check the spelling"
        cause = error
    except Exception as error:  # the hub's client raises its own, and those of its HTTP library
        why, cause = f"the hub says {type(error).__name__}: {' '.join(str(error).split())[:200]}", error
    raise InputError(f"{wanted}; got {name!r}: {why}") from cause


def handed_on(folder: Path) -> Mapping[str, bytes]:
    """The contents of the files that checkpoints take over, by name."""
    return {name: (folder / name).read_bytes() for name in HANDED_ON if (folder / name).is_file()}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that needs its base model from elsewhere."""
    return (folder / IS_ADAPTER).is_file() and not (folder / IS_MODEL).is_file()


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """What an adapter names as its base model: a folder or a hub's name, and the revision. InputError if nothing."""
    try:
        record = json.loads((folder / IS_ADAPTER).read_text(encoding="utf-8"))
        return str(record["base_model_name_or_path"]), record.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / IS_ADAPTER} must name its base model; it cannot be read ({type(error).__name__}: {error}); use "
            "another checkpoint"
        ) from error
