"""What a reload makes of changed settings: each one holds at once or is named as waiting for a restart."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edged.config import Config, RuntimeConfig, flattened, load_config
from edged.reloading import NEEDS_RESTART, compare


def base(tmp_path: Path) -> Config:
    return load_config(flags={}, environ={"HOME": str(tmp_path)}, file=None)


def other(value: Any) -> Any:
    """A value that is not this one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case Path():
            return value / "x"
        case tuple():
            return (*value, "x")
        case None:
            return "x"
    raise AssertionError(value)


def changes(config: Config) -> list[tuple[str, Config]]:
    """Every field of every section changed by itself, with the name of its section."""
    found = []
    for section in fields(config):
        before = getattr(config, section.name)
        if not is_dataclass(before):
            continue
        found += [
            (section.name, replace(config, **{section.name: replace(before, **{f.name: other(v)})}))  # type: ignore[type-var]  # it is a dataclass
            for f in fields(before)
            for v in [getattr(before, f.name)]
        ]
    return found


def test_every_setting_is_live_or_named_as_waiting(tmp_path: Path) -> None:
    """One change is one name; what waits is as it was, what is live is as it is now."""
    old = base(tmp_path)
    names = []
    for section, new in changes(old):
        found = compare(old, new)
        (name,) = found.live + found.waiting
        assert name.startswith(f"{section}.")
        assert bool(found.waiting) == (name in NEEDS_RESTART)
        assert found.config == (old if found.waiting else new)
        names.append(name)
    expected = {name for name in flattened(old) if not name.startswith("runtimes.")}
    assert sorted(names) == sorted(expected)
    assert expected > NEEDS_RESTART


def test_the_interpreter_of_a_runtime_needs_a_restart(tmp_path: Path) -> None:
    """Its template runs already."""
    old = base(tmp_path)
    new = replace(old, runtimes={**old.runtimes, "openvino": RuntimeConfig("/opt/python3.10")})
    found = compare(old, new)
    assert found.waiting == ("runtimes.openvino.python",)
    assert found.config.runtimes == old.runtimes


def test_what_waits_is_named_again_by_the_next_reload(tmp_path: Path) -> None:
    """Until the restart, or until the file says again what holds."""
    old = base(tmp_path)
    new = replace(
        old, limits=replace(old.limits, frames=5, queue_length=7), log=replace(old.log, level="debug")
    )
    first = compare(old, new)
    assert (first.live, first.waiting) == (("limits.queue_length", "log.level"), ("limits.frames",))
    second = compare(first.config, new)
    assert (second.live, second.waiting) == ((), ("limits.frames",))
    back = compare(second.config, replace(new, limits=replace(new.limits, frames=old.limits.frames)))
    assert (back.live, back.waiting) == ((), ())


@pytest.mark.parametrize("name", sorted(NEEDS_RESTART))
def test_what_needs_a_restart_is_a_setting(tmp_path: Path, name: str) -> None:
    """A name that is spelt wrong would be told as live."""
    assert name in flattened(base(tmp_path))
