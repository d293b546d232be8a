"""Chat templates of checkpoints: read from their folders and rendered as transformers renders them, in a sandbox.

A template is Jinja2 in `chat_template.jinja` or under `chat_template` in `tokenizer_config.json`; some checkpoints have
one more for conversations with tools. Templates come from strangers: they see plain data alone, and run in a process
that the system bounds (`rendering`).
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turnwise import rendering
from turnwise.errors import RunError
from turnwise.records import parsed

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that templates know by name."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A checkpoint's chat template."""

    source: str
    tool_source: str | None = None
    """The one for conversations with tools, where that is another."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """The special tokens that it knows by name, such as `bos_token`."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generate: bool = True,
    ) -> str:
        """The conversation as text; with `generate` up to where the policy goes on.

        `messages` and `tools` are in the shape of OpenAI's API, arguments as objects. Raises RunError, with the
        template's own reason, where it refuses the conversation or cannot be run.
        """
        source = self.tool_source if tools is not None and self.tool_source else self.source
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generate}
        try:
            return _RENDERER.render(source, {**values, **self.tokens})
        except (ValueError, TypeError, RecursionError, OSError) as error:
            raise RunError(
                f"the chat template must take the conversation; it fails with {error}; "
                "use messages of roles that it knows, or another template"
            ) from error


class _Renderer:
    """The process that renders, started when it is first asked, and again when it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, values: Mapping[str, Any] | None) -> str:
        """The text; ValueError with the reason where there is none."""
        request = json.dumps({"source": source, "values": values, "seconds": rendering.SECONDS}).encode() + b"\n"
        with self._lock:
            line = self._answer(request)
        if not line:
            self.close()
            raise ValueError(f"more than {rendering.SECONDS:g} seconds or {rendering.MEGABYTES} MB")
        answer = parsed(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def _answer(self, request: bytes) -> bytes:
        """The line that answers a request; none where the process ended over it."""
        process = self._started()
        assert process.stdin
        assert process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.flush()
        return process.stdout.readline()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-P", str(Path(rendering.__file__))]  # -P: our types.py is not Python's
            quiet = subprocess.DEVNULL
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, start_new_session=True
            )
        return self._process

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_RENDERER.__init__)  # the process answers the one that started it


def read_template(folder: Path) -> Template | None:
    """The chat template of a checkpoint folder; None where it has none.

    Raises RunError where its files cannot be read, or the template is not Jinja2.
    """
    settings = tokenizer_settings(folder)
    named = _named_sources(settings.get("chat_template"), folder)
    file = folder / "chat_template.jinja"
    if file.is_file():
        named["default"] = _text(file)
    named |= {path.stem: _text(path) for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    source = named.get("default") or named.get("tool_use")
    if source is None:
        return None
    template = Template(source=source, tool_source=named.get("tool_use"), tokens=named_tokens(settings))
    for text in filter(None, (template.source, template.tool_source)):
        try:
            _RENDERER.render(text, None)
        except (ValueError, OSError) as error:
            raise RunError(
                f"the chat template in {folder} must be Jinja2; it cannot be read ({error}); "
                "correct it, or delete it to use ChatML"
            ) from error
    return template


def write_template(template: Template, folder: Path) -> None:
    """Writes the template where `read_template` finds it; its named tokens stand in `tokenizer_config.json`."""
    (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    if template.tool_source:
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        path = folder / "additional_chat_templates" / "tool_use.jinja"
        path.write_text(template.tool_source, encoding="utf-8")


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` of a checkpoint folder; empty without one. RunError where it is damaged."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = parsed(_text(path))
    except ValueError as error:
        raise RunError(f"{path} must be JSON; it cannot be read ({error}); restore the file") from error
    if not isinstance(settings, dict):
        raise RunError(f"{path} must hold an object; got {type(settings).__name__}; restore the file")
    return settings


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer settings name; one may be written as text or as a record with `content`."""
    given = {name: settings.get(name) for name in NAMED_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _named_sources(given: Any, folder: Path) -> dict[str, str]:
    """Templates by name: `chat_template` is one text, or a list of records with name and template."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in given}
    except (TypeError, KeyError) as error:
        raise RunError(
            f"chat_template in {folder / 'tokenizer_config.json'} must be a text or a list of records with name and "
            f"template; got {type(given).__name__}; restore the file"
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} must be a text file; it cannot be read ({error}); restore the file") from error
