"""Words that the checks share: what a check yields, and the commands that end in an operator's shell.

Pure. Whatever comes from a file's name or from the daemon is quoted before it stands in a command.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from edged.cli.health.facts import Facts

__all__ = ["NAMED_MAX", "Rows", "are", "install", "names_text", "quoted", "restart", "times"]

Rows = Iterator[tuple[str, str, str]]
"""What a check yields for each thing that it looked at: a level, a sentence, and what to type."""

NAMED_MAX = 5
"""Names in one sentence or command; --json has all."""


def restart(facts: Facts) -> str:
    """How this very daemon is started again."""
    if facts.process is not None and facts.process.user_unit:
        return f"systemctl --user restart {facts.process.unit}"
    if facts.system:
        return f"systemctl restart {facts.unit.name}"
    return f"kill {facts.process.pid} && edged --models DIR" if facts.process else "edged --models DIR"


def install(facts: Facts, runtime: str) -> str:
    """How a runtime gets to where the others are: by the package manager or by pip."""
    packaged = any(
        package.directory.startswith("/usr/lib/edged") or "/runtimes/" in package.directory
        for package in facts.packages
    )
    packaged = packaged or facts.unit.properties.get("FragmentPath", "").startswith(("/usr/lib", "/lib"))
    if packaged:
        return f"apt-get install edged-runtime-{runtime}"
    if runtime == "cuda":
        return "pip uninstall -y onnxruntime && pip install 'edged[cuda]'"
    return f"pip install 'edged[{runtime}]'"


def quoted(value: object) -> str:
    """A word for the shell, whatever somebody has called his file."""
    return shlex.quote(str(value))


def names_text(names: list[str]) -> str:
    """Some of the names, and how many more there are."""
    shown = ", ".join(names[:NAMED_MAX])
    return shown if len(names) <= NAMED_MAX else f"{shown} and {len(names) - NAMED_MAX} more"


def are(names: list[str]) -> str:
    """The verb for so many names."""
    return "is" if len(names) == 1 else "are"


def times(count: object) -> str:
    """How often."""
    return "once" if str(count) == "1" else f"{count} times"
