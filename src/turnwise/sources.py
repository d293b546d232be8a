"""Where a policy's files are: in a folder, or on the Hugging Face hub; and those to hand on with its weights.

No code that stands beside a model is ever run, and weights are read from safetensors alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turnwise.errors import InputError
from turnwise.records import parsed

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
IMPLEMENTATIONS = ("eager", "sdpa", "batched_mm", "grouped_mm")
"""The ways to compute attention and experts that are transformers' and torch's own; others can be code of the hub."""
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


def check_code(folder: Path) -> None:
    """InputError where reading a model or an adapter could run what its maker wrote.

    Weights in anything but safetensors are programs, or hold them; what reads them refuses the worst, which is not
    relied upon. Settings can name kernels of the hub and modules to import.
    """
    for index in folder.glob("*.index.json"):
        named = _settings(index).get("weight_map")
        for name in named.values() if isinstance(named, dict) else [named]:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise _not_read(f"{index} lists {name!r}", "have its maker save it as safetensors")
    if is_adapter(folder):
        if not (folder / "adapter_model.safetensors").is_file():
            raise _not_read(f"{folder} has no adapter_model.safetensors", "have its maker save it as safetensors")
        if _settings(folder / IS_ADAPTER).get("megatron_config") is not None:
            raise _not_read(f"{folder / IS_ADAPTER} has a module to import, in megatron_config", "delete it there")
        return
    settings = _settings(folder / IS_MODEL)
    weights = settings.get("transformers_weights")
    if weights is not None and (Path(str(weights)).name != weights or not weights.endswith(".safetensors")):
        raise _not_read(f"{folder / IS_MODEL} has transformers_weights = {weights!r}", "delete it there")
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if settings.get(name) not in (None, *IMPLEMENTATIONS):
            raise _not_read(f"{folder / IS_MODEL} has {name} = {settings[name]!r}", "delete it there")


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = parsed(file.read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} must be JSON; it cannot be read ({error}); restore the file") from error


def _not_read(what: str, remedy: str) -> InputError:
    shown = " ".join(what.split())[:300]
    return InputError(f"a policy must be numbers and settings in safetensors and JSON alone; {shown}; {remedy}")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that needs its base model from elsewhere."""
    return (folder / IS_ADAPTER).is_file() and not (folder / IS_MODEL).is_file()


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """What an adapter names as its base model: a folder or a hub's name, and the revision. InputError if nothing."""
    try:
        record = parsed((folder / IS_ADAPTER).read_text(encoding="utf-8"))
        return str(record["base_model_name_or_path"]), record.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / IS_ADAPTER} must name its base model; it cannot be read ({type(error).__name__}: {error}); use "
            "another checkpoint"
        ) from error
