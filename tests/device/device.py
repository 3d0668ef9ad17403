"""The device as the checks see it: users, the service, its models, an app, and questions about them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.device.box import Box, until

__all__ = ["SERVE_S", "Device", "Model"]

SERVE_S = 90
"""Until something serves that was asked to, on a machine that does ten other things."""

USERS = {
    "asker": ["edged"],
    "dropper": ["edged-drop"],
    "boss": ["edged", "edged-admin"],
    "stranger": [],
}
"""Who lives on the device, and in which groups."""

_APP_UNIT = """\
[Unit]
Description=An app that sees edged's socket directory by a bind mount, as one in a container does
[Service]
User=asker
BindReadOnlyPaths=/run/edged:/srv/edged
StateDirectory=app
ExecStart=/usr/bin/python3 /opt/app.py /var/lib/app/report.json ipc:///srv/edged/edged.sock digits mlp
"""

Model = tuple[str, str]
"""A model's version and its content's SHA-256."""


class Device:
    """A box with edged's packages."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.sh = box.sh

    # ---- packages and users

    def bring(self, packages: Path, to: str) -> None:
        """Copies a folder of packages into the box."""
        shutil.copytree(packages, self.box.tree / to.lstrip("/"))

    def install(self, *files: str) -> str:
        """Installs packages from files, as an operator does."""
        return self.sh(
            f"DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends {' '.join(files)}",
            timeout_s=240,
        )

    def add_users(self) -> None:
        """Makes those who live on the device."""
        for name, groups in USERS.items():
            self.sh(f"useradd --create-home --groups '{','.join(groups)}' {name}")

    # ---- the service

    def show(self, what: str, unit: str = "edged.service") -> str:
        """One property of a unit."""
        return self.sh(f"systemctl show --value -p {what} {unit}")

    def pid(self) -> int:
        """The daemon's process, 0 when there is none."""
        return int(self.show("MainPID"))

    def await_other_pid(self, old: int, timeout_s: float = SERVE_S) -> int:
        """The new daemon's process once the old one was replaced and the new one is ready."""

        def other() -> int:
            pid = self.pid()
            return pid if pid not in (0, old) and self.show("ActiveState") == "active" else 0

        return until(other, what=f"another daemon than {old}", timeout_s=timeout_s)

    def restart(self) -> None:
        """Restarts the service and waits until the new daemon is ready."""
        old = self.pid()
        self.sh("systemctl restart edged")
        self.await_other_pid(old)

    def processes(self) -> list[int]:
        """The service's processes."""
        return [
            int(pid)
            for pid in self.sh(
                "cat /sys/fs/cgroup/systemd/system.slice/edged.service/cgroup.procs "
                "2>/dev/null || cat /sys/fs/cgroup/system.slice/edged.service/cgroup.procs"
            ).split()
        ]

    def journal(self, *matches: str, unit: str = "edged") -> list[dict[str, Any]]:
        """The service's records with these fields."""
        quoted = " ".join(f"'{each}'" for each in matches)
        lines = self.sh(f"journalctl -u {unit} -o json --no-pager {quoted}").splitlines()
        return [json.loads(line) for line in lines]

    # ---- models

    def drop(self, source: str, name: str, folder: str = "/var/lib/edged/models") -> None:
        """Puts a model into the folder as a careful member of edged-drop does."""
        self.sh(
            f"cp -r {source} {folder}/.new-{name} && mv -T {folder}/.new-{name} {folder}/{name}",
            user="dropper",
        )

    def models(self, endpoint: str = "") -> dict[str, Model]:
        """The models that are ready, as a member of the group edged is told."""
        where = f"--endpoint {endpoint}" if endpoint else ""
        done = self.box.run(["sh", "-c", f"edgectl --json {where} models"], user="asker", check=False)
        if done.returncode:
            return {}
        rows = json.loads(done.stdout)["models"]
        return {row["name"]: (row["version"], row["sha256"]) for row in rows if row["state"] == "READY"}

    def await_models(self, wanted: Mapping[str, Model] | set[str], endpoint: str = "") -> dict[str, Model]:
        """Waits until these serve: by name, or in exactly these versions and contents."""
        seen: dict[str, Model] = {}

        def there() -> bool:
            seen.clear()
            seen.update(self.models(endpoint))
            return set(wanted) <= set(seen) if isinstance(wanted, set) else dict(wanted) == seen

        try:
            until(there, what="", timeout_s=SERVE_S)
        except AssertionError:
            raise AssertionError(f"wanted {wanted}, but these are ready: {seen}") from None
        return seen

    def status(self) -> dict[str, Any]:
        """All of the status, as an administrator."""
        return dict(json.loads(self.sh("edgectl --json status", user="boss")))

    def devices(self) -> list[dict[str, str]]:
        """The verdicts on devices."""
        return list(json.loads(self.sh("edgectl --json devices", user="boss"))["devices"])

    # ---- an app

    def start_app(self) -> None:
        """Starts the app, which runs on whatever happens to the daemon."""
        self.box.write("/opt/app.py", (Path(__file__).parent / "app.py").read_text())
        self.box.write("/etc/systemd/system/app.service", _APP_UNIT)
        self.sh("rm -f /var/lib/app/report.json && systemctl daemon-reload && systemctl start app")
        self.await_answers(10)

    def report(self) -> dict[str, dict[str, Any]]:
        """How it goes, in the app's words."""
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self.box.tree / "var/lib/app/report.json").read_text()))
        return {}

    def await_answers(self, more: int) -> dict[str, dict[str, Any]]:
        """Waits until the app got this many more right answers of each model; none may have been wrong."""
        before = {name: counts["right"] for name, counts in self.report().items()}

        def asked() -> bool:
            now = self.report()
            return bool(now) and all(c["right"] >= before.get(name, 0) + more for name, c in now.items())

        until(asked, what=f"{more} more answers for the app, which has {self.report()}", timeout_s=SERVE_S)
        report = self.report()
        assert all(counts["wrong"] == 0 for counts in report.values()), f"wrong answers: {report}"
        return report

    def stop_app(self) -> None:
        """Ends the app."""
        self.sh("systemctl stop app")
