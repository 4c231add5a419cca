"""The far side of the template renderer: a process that renders chat templates and nothing else.

Every line on stdin is a request and every line on stdout its reply, as JSON; the first line holds
the memory limit. Nothing of Opsin is imported here. What a template does in this process can be
ended from outside, whatever it is busy with.
"""

import json
import math
import re
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

Reply = dict[str, str]


class Refusal(jinja2.TemplateError):
    """What a template says through `raise_exception`."""


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it renders its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class Dict:
    """`dict(...)` and `dict.fromkeys` without the class's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that holds no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is taken from the arguments so that a template can use that name.
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        refuse_private(name)
        super().__setitem__(name, value)


def refuse_private(name: object) -> None:
    """Keep templates from names that are Python's own."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template cannot store the name {name!r}")


def raise_exception(message: object) -> None:
    """Let a template refuse a conversation."""
    raise Refusal(str(message))


def strftime_now(pattern: str) -> str:
    """Today's date or the time, in local time."""
    return datetime.now().strftime(pattern)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def chat_environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with the settings and names that Hugging Face's chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Namespace
    )
    return environment


@lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """A template ready to render."""
    return chat_environment().from_string(source)


def render(source: str, variables: dict[str, Any], max_chars: int) -> Reply:
    """The text a template makes of its variables, or what went wrong."""
    try:
        pieces: list[str] = []
        size = 0
        for piece in compiled(source).generate(**variables):
            size += len(piece)
            if size > max_chars:
                return {"error": "output", "message": ""}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except Refusal as error:
        return {"error": "refused", "message": without_addresses(str(error))}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except Exception as error:  # noqa: BLE001  (a template can raise anything)
        return {
            "error": "failed",
            "message": without_addresses(f"{type(error).__name__}: {error}"),
        }


def without_addresses(text: str) -> str:
    """A message of bounded length with no object's address in it."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text[:2000])


def limit_memory(num_bytes: int) -> None:
    """Bound this process's address space, where the system knows such a limit."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def set_alarm(seconds: float) -> None:
    """Let the system end this process after so many seconds if its owner is gone; 0: never."""
    if sys.platform != "win32":
        signal.alarm(math.ceil(seconds))


def serve() -> None:
    """Answer requests until stdin closes."""
    limit_memory(json.loads(sys.stdin.buffer.readline())["memory"])
    for line in sys.stdin.buffer:
        request = json.loads(line)
        set_alarm(request["seconds"] + 5)
        reply = render(request["source"], request["variables"], request["max_chars"])
        set_alarm(0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
