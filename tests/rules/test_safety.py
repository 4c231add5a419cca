import ast
import re

import pytest

from .tree import (
    Source,
    called_name,
    dotted,
    findings,
    imported_modules,
    layer_of,
    source,
    sources,
)

# Modules that open connections. urllib.parse only reads text and is free.
NETWORK = (
    "aiohttp",
    "asyncio.open_connection",
    "ftplib",
    "grpc",
    "http.client",
    "http.server",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "requests",
    "smtplib",
    "socket",
    "socketserver",
    "urllib.request",
    "urllib3",
    "uvicorn",
    "websockets",
    "xmlrpc",
    "zmq",
)
CONNECTING_CALLS = {
    "asyncio.open_connection",
    "asyncio.start_server",
    "torch.hub.load",
    "torch.hub.download_url_to_file",
}
# Media and anything a request names goes through fetch.py; the others serve or name one library.
NETWORK_ALLOWED: tuple[tuple[str, frozenset[str]], ...] = (
    ("opsin/media/fetch.py", frozenset(NETWORK)),
    ("opsin/checkpoint/hub.py", frozenset({"huggingface_hub"})),
    ("opsin/server/", frozenset({"uvicorn"})),
    ("opsin/ui/", frozenset({"httpx"})),
    ("opsin/cli/bench_serve.py", frozenset({"httpx"})),
)
FORBIDDEN_IMPORTS = (
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
)
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "builtins.eval",
    "builtins.exec",
    "os.system",
    "os.popen",
    "torch.load",
    "pandas.read_pickle",
}
BARRED_SHELLS = {"os.spawnl", "os.spawnlp", "subprocess.getoutput", "subprocess.getstatusoutput"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
MACHINE_PATH = re.compile(r"^(/(home|work|tmp|opt|root|mnt|srv|Users)(/|$)|[A-Za-z]:\\)")


def _under(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def connections(file: Source) -> list[str]:
    """Imports and calls through which a file could open a socket, less what it is allowed."""
    allowed = next(
        (may for where, may in NETWORK_ALLOWED if file.path.startswith(where)), frozenset()
    )
    found = []
    for line, name in imported_modules(file):
        hit = next((m for m in NETWORK if _under(name, m)), None)
        bare = name == "urllib" and not _only_parse(file, line)
        if bare or (hit and hit not in allowed):
            found.append(f"{file.path}:{line} imports {name}")
    calls = [n for n in ast.walk(file.tree) if isinstance(n, ast.Call)]
    found += [
        f"{file.path}:{n.lineno} {called_name(n)}"
        for n in calls
        if called_name(n) in CONNECTING_CALLS
    ]
    return found


def _only_parse(file: Source, line: int) -> bool:
    """Whether the `urllib` seen on a line is `from urllib import parse`."""
    names = {name for at, name in imported_modules(file) if at == line}
    return names == {"urllib", "urllib.parse"}


def dangerous(file: Source) -> list[str]:
    """Code that runs text, unpickles bytes or starts a shell."""
    found = [
        f"{file.path}:{line} imports {name}"
        for line, name in imported_modules(file)
        if any(_under(name, module) for module in FORBIDDEN_IMPORTS)
        or name in {"os.system", "os.popen"}
    ]
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        name = called_name(node)
        risky = {"shell", "allow_pickle"}
        flags = [k.arg for k in node.keywords if k.arg in risky and not _is_false(k.value)]
        if name in FORBIDDEN_CALLS or name in BARRED_SHELLS or flags:
            found.append(f"{file.path}:{node.lineno} {name} {' '.join(flags)}".rstrip())
    return found


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def environment_reads(file: Source) -> list[str]:
    """Places that read or write environment variables."""
    found = [
        f"{file.path}:{line} imports {name}"
        for line, name in imported_modules(file)
        if name in ENVIRONMENT
    ]
    return found + [
        f"{file.path}:{node.lineno} {dotted(node)}"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Attribute) and dotted(node) in ENVIRONMENT
    ]


def machine_paths(file: Source) -> list[str]:
    """Text that names a folder of one machine."""
    return [
        f"{file.path}:{node.lineno} {node.value!r}"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and MACHINE_PATH.match(node.value)
    ]


def test_rows_02_and_17_only_the_fetcher_opens_sockets() -> None:
    assert findings(connections, sources()) == []


def test_rows_14_and_17_nothing_runs_text_unpickles_or_starts_a_shell() -> None:
    assert findings(dangerous, sources("opsin", "bench")) == []


def test_nothing_names_a_folder_of_one_machine() -> None:
    assert findings(machine_paths, sources("opsin", "bench")) == []


def test_only_config_reads_the_environment() -> None:
    others = [s for s in sources() if s.path != "opsin/config.py"]
    assert findings(environment_reads, others) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("opsin/cli/x.py", "import httpx"),
        ("opsin/cli/x.py", "import uvicorn"),
        ("opsin/media/image.py", "def f():\n    from urllib.request import urlopen"),
        ("opsin/media/image.py", "import urllib"),
        ("opsin/engine/x.py", "from urllib import request"),
        ("opsin/server/app.py", "import socket"),
        ("opsin/checkpoint/config.py", "from huggingface_hub import hf_hub_download"),
        ("opsin/checkpoint/hub.py", "import requests"),
        ("opsin/prompt/x.py", "import http.client"),
        ("opsin/towers/x.py", "torch.hub.load('a', 'b')"),
    ],
)
def test_a_way_to_the_network_is_found(path: str, text: str) -> None:
    assert connections(source(path, text))


def test_the_named_exceptions_are_let_through() -> None:
    assert connections(source("opsin/media/fetch.py", "import socket, httpx")) == []
    assert connections(source("opsin/server/serve.py", "import uvicorn")) == []
    assert connections(source("opsin/checkpoint/hub.py", "from huggingface_hub import x")) == []
    assert connections(source("opsin/media/data.py", "from urllib.parse import urlsplit")) == []
    assert connections(source("opsin/media/data.py", "from urllib import parse")) == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "def f():\n    import marshal",
        "os.system('ls')",
        "from os import system",
        "subprocess.run('ls', shell=True)",
        "subprocess.Popen('ls', shell=flag)",
        "torch.load('model.bin')",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_dangerous_code_is_found(text: str) -> None:
    assert dangerous(source("opsin/engine/x.py", text))


def test_harmless_code_is_let_through() -> None:
    text = (
        "model.eval()\nsubprocess.run(['cc', path], shell=False)\nnumpy.load(p, allow_pickle=False)"
    )
    assert dangerous(source("opsin/engine/x.py", text)) == []


@pytest.mark.parametrize(
    "text", ["import os\nos.environ['A']", "os.getenv('A')", "from os import environ"]
)
def test_a_read_of_the_environment_is_found(text: str) -> None:
    assert environment_reads(source("opsin/nn/x.py", text))


def test_a_path_of_one_machine_is_found() -> None:
    assert machine_paths(source("opsin/nn/x.py", "PATH = '/home/someone/model'"))
    assert machine_paths(source("opsin/nn/x.py", "ROUTE = '/v1/models'")) == []


def test_every_exception_names_a_layer_that_exists() -> None:
    paths = [where if where.endswith(".py") else f"{where}x.py" for where, _ in NETWORK_ALLOWED]
    assert None not in map(layer_of, paths)
