"""What was seen of a machine, of edged's installation on it and of its daemon: plain values, no judgement.

None stands for what could not be seen from here, which is not the same as what is not there. Everything can
be made up in a test and turned into JSON with `dataclasses.asdict`; nothing holds a secret, the content of a
model or of a setting's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Account",
    "Clock",
    "Daemon",
    "Devices",
    "Facts",
    "Heat",
    "Inotify",
    "Machine",
    "Memory",
    "ModelsFolder",
    "Node",
    "Package",
    "PciDevice",
    "Place",
    "Process",
    "Socket",
    "Unit",
    "may",
]

READ, WRITE, SEARCH = 4, 2, 1
"""The bits of a file's mode, as `may` takes them."""


@dataclass(frozen=True)
class Account:
    """A user as the system's files have it, or with the groups that a process really has."""

    name: str
    uid: int
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """A file, a directory or a device node: who it belongs to, and its permission bits."""

    path: str
    mode: int
    uid: int
    owner: str
    group: str


def may(node: Node, account: Account, bits: int) -> bool:
    """Whether the permission bits let the account do this; access control lists are not looked at."""
    if account.uid == 0:
        return True
    if node.uid == account.uid:
        return node.mode >> 6 & bits == bits
    if node.group in account.groups:
        return node.mode >> 3 & bits == bits
    return node.mode & bits == bits


@dataclass(frozen=True)
class Place:
    """A directory that edged works in; `node` is None where it is not there or cannot be looked at.

    `search` are the directories above it, for whoever has to get through them.
    """

    role: str
    path: str
    node: Node | None = None
    error: str = ""
    above: tuple[Node, ...] = ()
    total_bytes: int | None = None
    free_bytes: int | None = None
    free_inodes: int | None = None
    read_only: bool = False


@dataclass(frozen=True)
class Socket:
    """One of the daemon's sockets; `answer` is `answers`, `refused`, `denied`, or what else connect said."""

    name: str
    node: Node | None
    answer: str = ""


@dataclass(frozen=True)
class Process:
    """The daemon's process, as /proc has it; `unit` is its systemd unit, if it has one."""

    pid: int
    account: Account
    unit: str = ""
    user_unit: bool = False
    python: str = ""
    open_files_max: int | None = None
    stderr: str = ""


@dataclass(frozen=True)
class Daemon:
    """What the daemon said: its status, or why there is none (`error`, with the reason for programs)."""

    status: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    error: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Unit:
    """What `systemctl show` said; `error` when it could not be asked, for instance without systemd."""

    name: str
    properties: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def known(self) -> bool:
        """Whether there is such a unit at all."""
        return self.properties.get("LoadState", "not-found") not in ("not-found", "")


@dataclass(frozen=True)
class PciDevice:
    """A display controller or an accelerator on the PCI bus, and the kernel's driver of it."""

    address: str
    vendor: str
    pci_class: str
    driver: str


@dataclass(frozen=True)
class Devices:
    """The nodes that accelerators have in /dev, what is on the bus, and the drivers' libraries.

    `libraries` are the names that the dynamic linker would find; `nvidia_driver` is the kernel module's
    version; `renderers` maps a render node's name to its maker's PCI id.
    """

    nodes: tuple[Node, ...] = ()
    pci: tuple[PciDevice, ...] = ()
    renderers: Mapping[str, str] = field(default_factory=dict)
    libraries: frozenset[str] = frozenset()
    opencl_vendors: tuple[str, ...] = ()
    nvidia_driver: str = ""


@dataclass(frozen=True)
class Package:
    """An installed Python distribution and the directory that it lies in."""

    name: str
    version: str
    directory: str


@dataclass(frozen=True)
class Memory:
    """Of the machine, and of the daemon's control group (the tightest limit above it)."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    group_limit_bytes: int | None = None
    group_used_bytes: int | None = None
    oom_kills: int | None = None


@dataclass(frozen=True)
class Inotify:
    """The kernel's bounds for one user."""

    watches_max: int | None = None
    instances_max: int | None = None
    queued_max: int | None = None


@dataclass(frozen=True)
class Clock:
    """The wall clock: seconds since 1970, and whether something keeps it right."""

    now_s: float
    synchronised: bool | None = None


@dataclass(frozen=True)
class Heat:
    """Temperatures and slowing down. `throttle_count` counts since boot; `firmware` is a Raspberry Pi's word
    on voltage and heat, bits 0 to 3 being now."""

    hottest_c: float | None = None
    hottest: str = ""
    critical_c: float | None = None
    throttle_count: int | None = None
    firmware: int | None = None
    governor: str = ""
    governor_driver: str = ""
    cooling_now: bool | None = None


@dataclass(frozen=True)
class ModelsFolder:
    """What lies in the models folder: entries that are refused as (source, reason, message), names that are
    never looked at with their age in seconds, and files that are there but not for everybody to read."""

    entries: int = 0
    fault: str = ""
    problems: tuple[tuple[str, str, str], ...] = ()
    ignored: tuple[tuple[str, float], ...] = ()
    files: tuple[Node, ...] = ()
    directories: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What it is."""

    system: str = ""
    kernel: str = ""
    architecture: str = ""
    model: str = ""
    cpus: int = 0
    virtual: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything. `service` is the account that the daemon runs as, or would; `caller` is who asks.

    `system` says whether this is about the system's service rather than somebody's own daemon.
    """

    system: bool
    caller: Account
    caller_configured: Account
    service: Account | None
    service_name: str
    groups: Mapping[str, tuple[str, ...]]
    daemon: Daemon
    process: Process | None
    unit: Unit
    places: tuple[Place, ...]
    sockets: tuple[Socket, ...]
    config_file: str
    config_error: str
    disk_free_min_bytes: int
    temperature_max_c: float
    client_version: str
    packages: tuple[Package, ...] = ()
    machine: Machine = field(default_factory=Machine)
    devices: Devices = field(default_factory=Devices)
    memory: Memory = field(default_factory=Memory)
    inotify: Inotify = field(default_factory=Inotify)
    clock: Clock = field(default_factory=lambda: Clock(0.0))
    heat: Heat = field(default_factory=Heat)
    models: ModelsFolder = field(default_factory=ModelsFolder)

    def place(self, role: str) -> Place | None:
        """The directory with this role."""
        return next((each for each in self.places if each.role == role), None)

    def package(self, name: str) -> tuple[Package, ...]:
        """Where this distribution is installed."""
        return tuple(each for each in self.packages if each.name == name)
