"""Renders chat templates in a process of its own, with bounds that hold whatever a template does; a script by itself.

A template is a program, and a stranger's may never end, or make of three characters all the memory there is, in one
operation that no sandbox of Python's sees. So it runs where the system ends it: each request has its seconds of
computing, the process `MEGABYTES`, a text at most `MOST` characters. What else a template can reach is bounded by
Jinja2's sandbox.

A request is a line of JSON on stdin with the template's `source`, the `values` that it knows (null where it is read
alone) and its `seconds`. The answer is a line of JSON with the `text`, or why there is none.
"""

import contextlib
import datetime
import functools
import json
import sys
from typing import Any

TODAY = datetime.date(2024, 7, 26)
"""The date that templates are told, which is Llama 3's default, so that equal runs have equal prompts on any day."""
SECONDS = 10
MEGABYTES = 1024
MOST = 16_000_000
LONGEST_SOURCE = 1_000_000


def main() -> None:
    """Answers requests until stdin ends."""
    _bounded_memory()
    _compiled("")  # imports what is needed, outside any template's time
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _bounded_time(request["seconds"])
        try:
            answer = {"text": _rendered(request["source"], request["values"])}
        except Exception as error:  # whatever a stranger's program raises
            answer = {"error": " ".join(f"{error}".split())[:200] or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        _bounded_time(0)


def _rendered(source: str, values: dict[str, Any] | None) -> str:
    if len(source) > LONGEST_SOURCE:
        raise ValueError(f"a template must have at most {LONGEST_SOURCE} characters; it has {len(source)}")
    template = _compiled(source)
    text = "" if values is None else template.render(**values)
    if len(text) > MOST:
        raise ValueError(f"a text must have at most {MOST} characters; this one has {len(text)}")
    return text


def _bounded_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; or there is a stricter bound already
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _bounded_time(seconds: float) -> None:
    """The system ends the process once it has computed for so many seconds; 0 takes that back."""
    with contextlib.suppress(ImportError, AttributeError):  # not on Windows
        import signal

        signal.setitimer(signal.ITIMER_PROF, seconds)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, by which some templates mark the assistant's text, writes what it encloses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(source)


if __name__ == "__main__":
    main()
