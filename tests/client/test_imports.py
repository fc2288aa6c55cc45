"""What may be imported where: the client is thin, the daemon's rooms look down, never up."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import mlflow_relay
import mlflow_relay_daemon
from mlflow_relay_daemon.__main__ import EXTRA_MODULES
from tests.support.relay import Node, finish

CLIENT = Path(mlflow_relay.__file__).parent
DAEMON = Path(mlflow_relay_daemon.__file__).parent

#: Top first; a room may import from its own floor and from those below. HOUSE_STYLE, The house:
#: commands → service → intake/delivery → spool/lineage → the client's formats.
FLOORS = [
    ["__main__", "cli", "commands", "demo"],
    ["service", "api", "importers", "sync"],
    ["opening"],
    ["combiner", "node_metrics", "own_records"],
    [
        "intake",
        "adoption",
        "control",
        "status",
        "hosted",
        "delivery",
        "lane",
        "sidecar",
        "artifacts",
    ],
    [
        "attachment",
        "dead_letters",
        "bisect_refusal",
        "batch",
        "retry",
        "sinks",
        "spool",
        "lease",
        "reload",
        "reduction",
    ],
    ["states", "config", "control_client", "journal_folder", "foreign"],
    ["setting", "settings_file", "counters", "access", "endpoint", "sensors", "screen"],
    ["exits", "logs", "systemd", "witness", "words"],
]
#: Rooms that stand lower than the folder they are in.
LOWER = {"sinks.redact": 6}
#: What a pure room may import from the standard library: nothing that reads, writes or waits.
PURE = {
    *(
        "__future__",
        "base64",
        "codecs",
        "collections",
        "dataclasses",
        "datetime",
        "email",
        "enum",
        "fractions",
    ),
    "functools",
    *(
        "itertools",
        "json",
        "math",
        "operator",
        "posixpath",
        "random",
        "re",
        "string",
        "struct",
        "types",
    ),
    *("typing", "urllib.parse", "uuid", "zlib"),
}


@cache
def imports(package: Path) -> dict[str, set[str]]:
    """Return what each module of a package imports, wherever in it, by dotted names; nothing is
    run, and what stands under TYPE_CHECKING counts as well."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        module = ".".join([package.name, *path.relative_to(package).with_suffix("").parts])
        module = module.removesuffix(".__init__")
        is_package = path.name == "__init__.py"
        found[module] = set(names_in(ast.walk(ast.parse(path.read_text())), module, is_package))
    return found


def names_in(nodes: Iterator[ast.AST], module: str, is_package: bool) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules_named(names: set[str], package: Path) -> set[str]:
    """Return those names that are modules of the package."""
    return names & set(imports(package))


def floor_of(module: str) -> int:
    room = module.removeprefix(f"{DAEMON.name}.")
    if room in LOWER:
        return LOWER[room]
    (floor,) = [index for index, rooms in enumerate(FLOORS) if room.split(".")[0] in rooms]
    return floor


# ── the client ──


def test_the_client_imports_nothing_but_the_standard_library_zmq_and_msgpack():
    allowed = {*sys.stdlib_module_names, "zmq", "msgpack", CLIENT.name}
    drop_ins = {f"{CLIENT.name}.mlflow_store", f"{CLIENT.name}.mlflow_artifacts"}
    wrong = {
        module: foreign
        for module, names in imports(CLIENT).items()
        if module not in drop_ins  # which MLflow imports, and nobody else
        and (foreign := {name for name in names if name.split(".")[0] not in allowed})
    }
    others = [names for module, names in imports(CLIENT).items() if module not in drop_ins]
    assert not any(names & drop_ins for names in others)
    assert wrong == {}
    assert len(imports(CLIENT)) > 10


BLOCKER = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in BLOCKED:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    BLOCKED = set(sys.argv[2].split(","))
    sys.meta_path.insert(0, Blocker())
"""
ALONE = """
    try:
        import mlflow
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("the blocker does not block")
    import mlflow_relay
    with mlflow_relay.start_run("exp", "name", params={"lr": 1}, tags={"a": "b"},
                                socket=sys.argv[1], end_timeout_s=0.1) as run:
        run.log_metrics({"loss": 0.5}, step=1)
        mlflow_relay.log_metric("loss", 0.25)
    loaded = {name.split(".")[0] for name in sys.modules}
    print(sorted(loaded & (BLOCKED | {"mlflow_relay_daemon"})))
"""


def test_the_client_works_where_nothing_of_the_daemon_is_installed():
    others = {"numpy", "torch", "requests", "google", "yaml", "opentelemetry"}
    blocked = EXTRA_MODULES | others | {"mlflow_relay_daemon", "mlflow_skinny", "httpx"}
    with tempfile.TemporaryDirectory(prefix="relay-imports-", dir="/dev/shm") as folder:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "\n".join(line.removeprefix("    ") for line in (BLOCKER + ALONE).splitlines()),
                f"{folder}/relay.sock",
                ",".join(blocked),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_first_import_brings_no_room_that_only_some_need():
    """Each rank of thousands pays for it: 5 ms are a node-minute in a large job."""
    script = "import sys, mlflow_relay; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.split())

    needless = {"subprocess", "json", "asyncio", "multiprocessing", "tomllib", "sqlite3", "ssl"}
    before = subprocess.run(
        [sys.executable, "-c", "import sys, zmq, msgpack, logging; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert needless & (loaded - set(before.stdout.split())) == set()
    assert "mlflow_relay.run" in loaded


# ── pure rooms ──


def is_pure(path: Path) -> bool:
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    return re.search(r"\bPure\.(\s|$)", first) is not None


def test_rooms_that_are_pure_import_nothing_that_reads_writes_or_waits():
    checked, wrong = [], {}
    for package in (CLIENT, DAEMON):
        for path in package.rglob("*.py"):
            if not is_pure(path):
                continue
            module = ".".join([package.name, *path.relative_to(package).with_suffix("").parts])
            checked.append(module)
            names = imports(package)[module]
            foreign = {
                name
                for name in names
                if name.split(".")[0] in {*sys.stdlib_module_names, "zmq", "urllib3"}
                and not any(f"{name}.".startswith(f"{pure}.") for pure in PURE)
            }
            if foreign:
                wrong[module] = foreign
    assert wrong == {}
    assert {
        "mlflow_relay.records",
        "mlflow_relay.frames",
        "mlflow_relay.messages",
        "mlflow_relay_daemon.batch",
        "mlflow_relay_daemon.states",
        "mlflow_relay_daemon.spool.sequences",
    } <= set(checked)


# ── the daemon ──


def test_the_daemon_knows_only_the_formats_of_the_client_and_what_both_must_agree_on():
    shared = {
        *(
            "_version",
            "clock",
            "errors",
            "fingerprint",
            "frames",
            "journal_files",
            "lineage",
            "messages",
            "paths",
            "records",
            "values",
        ),
        "launch",  # relay_run_id
    }
    wrong = {
        module: foreign
        for module, names in imports(DAEMON).items()
        if not module.startswith(f"{DAEMON.name}.demo")  # whose ranks are ranks like others
        and (
            foreign := {
                name for name in modules_named(names, CLIENT) if name.split(".")[-1] not in shared
            }
            - {CLIENT.name}
        )
    }
    assert wrong == {}


def test_every_room_of_the_daemon_has_its_floor():
    rooms = {module.split(".")[1] for module in imports(DAEMON) if "." in module}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_no_room_imports_from_a_floor_above_it():
    wrong = [
        f"{module} (floor {floor_of(module)}) imports {name} (floor {floor_of(name)})"
        for module, names in imports(DAEMON).items()
        if module != DAEMON.name
        for name in sorted(modules_named(names, DAEMON) - {DAEMON.name})
        if floor_of(name) < floor_of(module)
    ]
    assert wrong == []


def test_no_two_rooms_import_each_other():
    """Counted at the module's own level: what a function imports, it imports when called."""
    graph = {}
    for package in (CLIENT, DAEMON):
        for path in package.rglob("*.py"):
            module = ".".join([package.name, *path.relative_to(package).with_suffix("").parts])
            module = module.removesuffix(".__init__")
            body = iter(ast.parse(path.read_text()).body)
            names = set(names_in(body, module, path.name == "__init__.py"))
            # A package's __init__ is no part of the order inside it, but is what it says itself.
            graph[module] = modules_named(names, package) - {package.name, module}
    circles = [
        f"{module} ⇄ {other}"
        for module, others in graph.items()
        for other in others
        if module in reachable(graph, other)
    ]
    assert circles == []


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        for each in graph[left.pop()] - found:
            found.add(each)
            left.append(each)
    return found


RANK = """
    import mlflow_relay
    with mlflow_relay.start_run("imports", run_key="imports") as run:
        run.log_metric("loss", 0.5, step=1)
"""


def test_a_daemon_that_delivers_over_http_never_imports_mlflow(tmp_path, mlflow_server):
    """Importing mlflow costs 2.7 s and 169 MB on every node."""
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node._daemon_environ["PYTHONPROFILEIMPORTTIME"] = "1"
        node.start()
        finish([node.rank(RANK)])
        ended = node.wait_until_ended()
        assert ended["delivered_points"] == 1
        assert node.stop() == 0
        imported = set(re.findall(r"^import time:.*\| +(\S+)$", node.log.read_text(), re.MULTILINE))

    assert {"mlflow_relay_daemon.lane", "urllib3"} <= imported  # the log is what it seems to be
    heavy = {"mlflow", "pandas", "numpy", "sqlalchemy", "google"}
    assert {name for name in imported if name.split(".")[0] in heavy} == set()
