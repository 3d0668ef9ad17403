"""The direction of imports: what each module may know, held by reading their import statements."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "edged"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
PURE = ("messages", "wire", "tensors", "errors", "scheduler", "statistics", "devices", "events", "instances")
PURE += ("registry", "workers", "placement", "turns", "retirement", "lifecycle", "entries")
PURE += (
    "choosing",
    "core",
    "runs",
    "admission",
    "estimate",
    "cache",
    "status",
    "metrics",
    "resources",
    "regions",
    "happenings",
    "properties",
    "families",
    "reloading",
    "setups",
    "sizes",
    "typical",
)
PURE += tuple(f"cli.health.{name}" for name in ("facts", "checks", "hardware", "folders", "words"))
IMPURE = {"zmq", "psutil", "numpy", "threading", "time", "logging", "socket", "subprocess", "os", "asyncio"}
IMPURE |= {"onnxruntime", "openvino", "watchdog", "systemd", "msgpack"}

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(f"edged.{name}" for name in layer.split())
    for layer in (
        "errors version families",
        "tensors messages units properties",
        "sizes wire config resources estimate statistics regions",
        "typical",
        "cache",
        "scheduler happenings",
        "repository devices reloading",
        "events setups",
        "instances",
        "registry workers placement",
        "turns runs admission",
        "retirement",
        "lifecycle",
        "entries choosing status metrics",
        "core",
        "copies",
        "sites helper transport store watcher system journald exporter pressure process assembly",
        "journal",
        "lanes children disk heartbeat",
        "daemon",
        "cli.edged",
    )
)


def imports(module: str, *, types_too: bool = False) -> set[str]:
    """What a module imports at its top, or anywhere in it; without what only a type checker reads."""
    tree = ast.parse(FILES[module].read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not types_too:
            skipped.update(each for part in node.body for each in ast.walk(part))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            base = node.module or ""
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base)
    return found


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_touch_nothing(name: str) -> None:
    """No socket, clock, thread, process, log or tensor library above the core's line."""
    found = {each.partition(".")[0] for each in imports(f"edged.{name}")}
    assert not found & IMPURE


@pytest.mark.parametrize("rank", range(len(LAYERS)))
def test_imports_point_downwards(rank: int) -> None:
    """A module knows those below it and beside it, none above."""
    above = frozenset().union(*LAYERS[rank + 1 :])
    for module in LAYERS[rank]:
        assert module in FILES, f"{module} is gone; take it out of LAYERS"
        assert not imports(module) & above


def test_nothing_is_imported_in_a_circle() -> None:
    """Among all modules of the package, what types need included."""
    graph = {m: {i for i in imports(m) if i in FILES} for m in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for each in graph[module]:
                visit(each, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_only_the_daemon_composes() -> None:
    """What holds sockets, processes and files meets in one module; the disk's side is one thing already."""
    holders = {"edged.transport", "edged.process", "edged.disk", "edged.lanes"}
    composers = {m for m in FILES if len(imports(m) & holders) > 1}
    assert composers == {"edged.daemon"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after some code."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_the_supervisor_carries_no_tensor_library() -> None:
    """Its memory stays small, and a runtime's bug cannot reach it."""
    assert not loaded_by("import edged.daemon") & {"numpy", "onnxruntime", "openvino", "onnx"}


@pytest.mark.parametrize("what", ["edged.client", "edged.session", "edged.cli.edgectl"])
def test_the_client_needs_three_libraries(what: str) -> None:
    """pyzmq, msgpack and numpy are all that an app's machine must have."""
    daemons = {"msgspec", "psutil", "watchdog", "systemd", "onnxruntime", "openvino", "onnx"}
    assert not loaded_by(f"import {what}") & daemons
