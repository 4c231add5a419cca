"""A template that never ends, or makes gigabytes, is stopped; the next one is rendered."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from opsin.errors import EngineError, InputError
from opsin.prompt.renderer import Renderer, RenderLimits

ENDLESS = {
    "loops without output": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "loops with output": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{{ '' }}{% endfor %}{% endfor %}",
    "a filtered loop": "{% for i in range(99999) %}{% for j in range(99999) if j is odd %}"
    "{% endfor %}{% endfor %}",
    "recursion in breadth": "{% macro f(n) %}{% if n %}{% for i in range(99) %}{% set x = f(n-1) %}"
    "{% endfor %}{% endif %}{% endmacro %}{{ f(50) }}",
    "a power": "{{ 7 ** (7 ** 9) }}",
    "comparing nested lists": "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
}
GREEDY = {
    "a string multiplied": "{{ 'x' * 10 ** 10 }}",
    "a string doubled": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a list multiplied": "{{ [1] * 10 ** 10 }}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a format": "{{ '{:9999999999}'.format(1) }}",
    "a padded string": "{{ 'x'.ljust(9999999999) }}",
    "centred": "{{ 'x' | center(9999999999) }}",
    "replaced": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "joined": "{{ ('a' * 100000) | list | join('b' * 100000) }}",
    "written": "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "a large range": "{% for i in range(10**9) %}{% endfor %}",
    "filler text": "{{ lipsum(n=10**6) }}",
    "indented": "{{ [1] | tojson(indent=10**10) }}",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    renderer = Renderer(RenderLimits(seconds=0.7, chars=1 << 20, memory=256 << 20))
    renderer.render("warm", {})
    yield renderer
    renderer.close()


@pytest.mark.parametrize("source", [*ENDLESS.values(), *GREEDY.values()], ids=[*ENDLESS, *GREEDY])
def test_it_is_stopped_and_the_next_is_rendered(renderer: Renderer, source: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError):
        renderer.render(source, {})
    assert time.monotonic() - started < 30
    for _ in range(3):
        try:
            assert renderer.render("{{ x }}", {"x": "after"}) == "after"
            break
        except InputError:  # a busy machine may need more than one try to start again
            continue
    else:
        pytest.fail("the renderer did not come back")


def test_the_limit_is_named() -> None:
    slow = Renderer(RenderLimits(seconds=0.3))
    with pytest.raises(InputError, match=r"more than 0\.3 s"):
        slow.render(ENDLESS["loops without output"], {})
    slow.close()
    small = Renderer(RenderLimits(chars=1000, memory=256 << 20))
    with pytest.raises(InputError, match="more than 1000 characters"):
        small.render("{{ 'x' * 1001 }}", {})
    assert small.render("{{ 'x' * 1000 }}", {}) == "x" * 1000
    if sys.platform == "linux":
        with pytest.raises(InputError, match="256 MiB of memory"):
            small.render("{{ ('x' * 10 ** 10) | length }}", {})
    small.close()


def test_many_threads_share_one_renderer() -> None:
    renderer = Renderer()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: renderer.render("{{ n }}", {"n": n}), range(100)))
    renderer.close()
    assert texts == [str(n) for n in range(100)]


def test_it_works_outside_the_main_thread() -> None:
    caught: list[str] = []

    def work() -> None:
        renderer = Renderer(RenderLimits(seconds=0.5))
        try:
            renderer.render(ENDLESS["a power"], {})
        except InputError as error:
            caught.append(str(error))
        renderer.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "more than 0.5 s" in caught[0]


def test_a_process_that_went_away_is_replaced() -> None:
    renderer = Renderer()
    assert renderer.render("a", {}) == "a"
    process = renderer._process
    assert process is not None
    process.kill()
    assert renderer.render("b", {}) == "b"
    renderer.close()
    assert renderer.render("c", {}) == "c"
    renderer.close()


@pytest.mark.parametrize("program", ["", "/nowhere/python"])
def test_a_program_that_cannot_be_started_is_said(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    renderer = Renderer()
    with pytest.raises(EngineError, match="may execute"):
        renderer.render("a", {})
    monkeypatch.undo()
    assert renderer.render("a", {}) == "a"
    renderer.close()


def test_closing_leaves_no_process() -> None:
    renderer = Renderer()
    renderer.warm_up()
    process = renderer._process
    assert process is not None
    renderer.close()
    assert not process.alive


def test_any_text_survives() -> None:
    renderer = Renderer()
    text = 'é漢😀\u2028\n\r\t"\\\x00\ud800'
    assert renderer.render("{{ x }}", {"x": text}) == text
    renderer.close()


def test_importing_prompts_is_light() -> None:
    code = (
        "import sys; import opsin.prompt.template, opsin.prompt.tokenizer, opsin.prompt.api,"
        " opsin.prompt.stream, opsin.prompt.detokenize;"
        "print([m for m in ('torch', 'transformers', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]", done.stderr
