"""The operator's day, check by check, in the order in which they are run.

A check raises an AssertionError when edged does not do what is promised, and returns what was seen, for the
table. Each leaves the device serving, so that the next one can begin there.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable

from tests.device.box import until
from tests.device.device import SERVE_S, Device, Model

__all__ = ["CHECKS", "Check"]

Check = Callable[[Device], str]

CHECKS: list[tuple[str, Check]] = []
"""What is checked, in order: a title for the table, and the check."""

ENDPOINT_SMALL = "ipc:///run/edged-small/edged.sock"

WATCHDOG_S = 150
"""Until systemd has replaced a daemon that stands still: WatchdogSec, then TimeoutStopSec, then the start."""

REST_S = 60
"""How long a daemon at rest is watched."""

_UNTOUCHED = frozenset(
    {
        *("proc", "sys", "dev", "run", "tmp", "root", "home", "srv", "var/tmp", "var/log", "var/cache"),
        *(
            "var/lib/apt",
            "var/lib/dpkg",
            "var/lib/app",
            "var/lib/systemd/catalog",
            "var/lib/systemd/random-seed",
        ),
    }
)
"""What a system writes whether or not edged comes and goes, and what these checks write."""

_state: dict[str, object] = {}
"""What a later check compares with."""


def check(title: str) -> Callable[[Check], Check]:
    """Puts a check into the list."""

    def keep(function: Check) -> Check:
        CHECKS.append((title, function))
        return function

    return keep


def files(device: Device) -> set[str]:
    """All files and directories but `_UNTOUCHED`."""
    root = str(device.box.tree)
    found: set[str] = set()
    for folder, folders, names in os.walk(root):
        inside = os.path.relpath(folder, root)
        if inside in _UNTOUCHED or folder.endswith("/__pycache__"):
            folders.clear()
            continue
        found.update(os.path.normpath(f"{inside}/{name}") for name in (*folders, *names))
    return found


# ---- install and serve ----------------------------------------------------------------------------------


@check("install from files, without a network")
def install(device: Device) -> str:
    _state["files"] = files(device)
    begin = time.monotonic()
    device.install(
        "/packages/1/edged_*.deb", "/packages/1/edged-runtime-cpu_*.deb", "/packages/1/python3-*.deb"
    )
    took_s = time.monotonic() - begin
    assert device.sh("systemctl is-enabled edged") == "enabled"
    until(lambda: device.show("ActiveState") == "active", what="the service to start", timeout_s=SERVE_S)
    used = device.sh("du -sk --apparent-size /usr/lib/edged | cut -f1")
    assert int(used) < 200_000, f"{used} KiB"
    assert device.sh("dpkg --audit") == ""
    device.add_users()
    return f"{took_s:.0f} s; /usr/lib/edged has {int(used) / 1000:.0f} MB, bytecode included"


@check("units pass systemd-analyze verify and security")
def units(device: Device) -> str:
    said = device.box.run(["systemd-analyze", "verify", "edged.service", "edged@small.service"])
    assert not said.stderr.strip(), said.stderr
    scores = []
    for bound in (1.6, 0.9):
        shown = device.sh("systemd-analyze --no-pager security edged.service")
        found = re.search(r"exposure level for edged\.service: ([0-9.]+)", shown)
        assert found is not None, shown
        assert float(found[1]) <= bound, f"{found[1]} is more than {bound}"
        scores.append(found[1])
        if bound == 1.6:
            drop_in = "/usr/share/doc/edged/examples/edged.service.d/cpu-only.conf"
            device.sh(f"install -D -m 644 {drop_in} -t /etc/systemd/system/edged.service.d")
            device.sh("systemctl daemon-reload")
    device.restart()
    device.sh("rm -r /etc/systemd/system/edged.service.d && systemctl daemon-reload")
    device.restart()
    return f"exposure {scores[0]}, with the CPU-only drop-in {scores[1]}"


@check("edged-drop may write the models folder, and nothing else")
def drop(device: Device) -> str:
    device.drop("/usr/share/edged/examples/digits", "digits")
    device.drop("/opt/models/mlp.onnx", "mlp.onnx")
    _state["models"] = device.await_models({"digits", "mlp"})
    for path in (
        "/var/lib/edged",
        "/var/lib/edged/store",
        "/etc/edged",
        "/run/edged",
        "/usr/lib/edged",
        "/var/cache/edged",
    ):
        done = device.box.run(["touch", f"{path}/x"], user="dropper", check=False)
        assert done.returncode, f"a member of edged-drop may write {path}"
    done = device.box.run(["edgectl", "models"], user="dropper", check=False)
    assert done.returncode == 1, "a member of edged-drop alone may ask"
    done = device.box.run(["touch", "/var/lib/edged/models/x"], user="asker", check=False)
    assert done.returncode, "a member of edged alone may write the models folder"
    return f"{len(device.models())} models from a member's copies"


@check("edgectl put --wait, private files of a member included")
def put(device: Device) -> str:
    device.sh("usermod -aG edged,edged-drop boss")
    device.sh("umask 077; edgectl put /opt/models/mlp2.onnx --name private --wait --timeout 60", user="boss")
    device.sh("rm /var/lib/edged/models/private.onnx", user="boss")
    device.await_models(_models())
    return "published with umask 077, serving, and gone with its file"


@check("who may ask: members yes, strangers no, admin's socket for edged-admin")
def access(device: Device) -> str:
    said = device.sh("edgectl infer digits --json -i image=@/opt/models/image.npy", user="asker")
    assert "label" in said, said
    done = device.box.run(["edgectl", "models"], user="stranger", check=False)
    assert done.returncode == 1, done
    assert "usermod -aG edged" in done.stderr, done.stderr
    done = device.box.run(["edgectl", "unload", "digits"], user="asker", check=False)
    assert done.returncode == 1, done
    assert "edged-admin" in done.stderr, done.stderr
    done = device.box.run(["edgectl", "unload", "mlp"], user="boss")
    device.sh("edgectl load mlp", user="boss")
    device.await_models(_models())
    return "the refusals name the group"


@check("an app with Debian's own pyzmq, msgpack and numpy")
def client(device: Device) -> str:
    device.start_app()
    versions = device.sh(
        "python3 -c 'import zmq, msgpack, numpy as n; print(zmq.__version__, msgpack.version, n.__version__)'"
    )
    return f"pyzmq, msgpack, numpy: {versions}"


# ---- the journal ----------------------------------------------------------------------------------------


@check("the journal by field, with explanations")
def journal(device: Device) -> str:
    rows = device.journal("MODEL=digits")
    kinds = {row.get("EVENT") for row in rows}
    assert "model_ready" in kinds, kinds
    assert all(row.get("MODEL") == "digits" for row in rows)
    ready = next(row for row in rows if row["EVENT"] == "model_ready")
    explained = device.sh(f"journalctl --no-pager -x MESSAGE_ID={ready['MESSAGE_ID']}")
    assert "Defined-By: edged" in explained, explained
    lines = len(device.journal())
    device.await_answers(100)
    assert len(device.journal()) - lines < 10, "inferences are written to the journal"
    return f"{len(rows)} records of one model; none for 200 inferences"


@check("systemctl status tells the story in one line; edgectl doctor finds nothing to mend")
def status(device: Device) -> str:
    line = device.show("StatusText")
    assert "2 of 2 models ready" in line, line
    done = device.box.run(["edgectl", "doctor"], user="boss", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return line


@check("manual pages, completions and licences are there")
def documents(device: Device) -> str:
    for page in ("man8/edged.8.gz", "man1/edgectl.1.gz", "man5/edged.toml.5.gz"):
        device.sh(f"gzip -t /usr/share/man/{page}")
    device.sh("bash -n /usr/share/bash-completion/completions/edgectl")
    licences = device.sh("find /usr/share/doc/edged*/licenses -type f | wc -l")
    assert int(licences) > 20, licences
    return f"{licences} licence texts"


# ---- settings -------------------------------------------------------------------------------------------


@check("reload: what can change does, what is wrong is refused and changes nothing")
def reload(device: Device) -> str:
    pid = device.pid()
    kept = (device.box.tree / "etc/edged/edged.toml").read_text()
    device.box.write("/etc/edged/edged.toml", kept + 'level = "debug"\nformat = "journal"\n')
    device.sh("systemctl reload edged")
    read = until(
        lambda: device.journal("EVENT=config_reloaded"), what="the reload's record", timeout_s=SERVE_S
    )
    assert "log.level" in read[-1]["CHANGED"], read[-1]
    assert "log.format" in read[-1]["NEEDS_RESTART"], read[-1]
    device.box.write("/etc/edged/edged.toml", "[servr]\n")
    device.box.run(["systemctl", "reload", "edged"], check=False)
    refused = until(
        lambda: device.journal("EVENT=config_rejected"), what="the refusal's record", timeout_s=SERVE_S
    )
    device.box.write("/etc/edged/edged.toml", kept)
    device.sh("systemctl reload edged")
    assert device.pid() == pid, "a reload started another daemon"
    device.await_answers(10)
    return str(refused[-1].get("REASON") or refused[-1].get("DETAIL") or refused[-1]["MESSAGE"])[:100]


@check("a wrong setting at start: given up at once, and OnFailure= rings")
def on_failure(device: Device) -> str:
    examples = "/usr/share/doc/edged/examples"
    device.sh(
        f"install -D -m 644 {examples}/edged.service.d/alarm.conf -t /etc/systemd/system/edged.service.d"
    )
    device.sh(f"cp '{examples}/edged-alarm@.service' /etc/systemd/system/ && systemctl daemon-reload")
    kept = (device.box.tree / "etc/edged/edged.toml").read_text()
    device.box.write("/etc/edged/edged.toml", "[servr]\n")
    device.box.run(["systemctl", "restart", "edged"], check=False)
    until(lambda: device.show("ActiveState") == "failed", what="the unit to fail", timeout_s=SERVE_S)
    assert device.show("ExecMainStatus") == "78"

    def rang() -> bool:
        return "edged.service has failed" in device.sh("journalctl --no-pager -t edged-alarm")

    until(rang, what="the alarm", timeout_s=SERVE_S)
    device.box.write("/etc/edged/edged.toml", kept)
    device.sh("rm -r /etc/systemd/system/edged.service.d '/etc/systemd/system/edged-alarm@.service'")
    device.sh("systemctl daemon-reload && systemctl reset-failed edged && systemctl start edged")
    device.await_models(_models())
    return "exit 78 (CONFIG), no restart, one alarm"


# ---- faults ---------------------------------------------------------------------------------------------


@check("kill -9 of the daemon")
def kill(device: Device) -> str:
    old, begin = device.pid(), time.monotonic()
    device.sh(f"kill -9 {old}")
    device.await_other_pid(old)
    device.await_models(_models())
    took_s = time.monotonic() - begin
    device.await_answers(10)
    return f"all models serve again after {took_s:.1f} s"


@check("a daemon that stands still (SIGSTOP) is replaced by systemd's watchdog")
def stop_signal(device: Device) -> str:
    old, begin = device.pid(), time.monotonic()
    device.sh(f"kill -STOP {old}")
    device.await_other_pid(old, WATCHDOG_S)
    device.await_models(_models())
    took_s = time.monotonic() - begin
    assert "Watchdog timeout" in device.sh("journalctl --no-pager -u edged _PID=1")
    device.await_answers(10)
    return f"replaced after {took_s:.0f} s"


@check("workers killed under load")
def kill_workers(device: Device) -> str:
    daemon = device.pid()
    for _ in range(3):
        pids = [worker["pid"] for worker in device.status()["workers"]]
        device.sh(f"kill -9 {' '.join(map(str, pids))}")
        device.await_answers(10)
    device.await_models(_models())
    assert device.pid() == daemon, "the daemon was restarted"
    return "three rounds; the daemon went on"


@check("a full disk refuses what is new, in figures; what serves goes on")
def full_disk(device: Device) -> str:
    # Another instance, whose state is on a small disk of its own.
    device.sh("mkdir -p /var/lib/edged-small /etc/edged-small")
    device.sh("mount -t tmpfs -o size=24m tmpfs /var/lib/edged-small")
    device.box.write("/etc/edged-small/edged.toml", '[resources]\ndisk_free_min = "8MiB"\n')
    device.sh("systemctl start edged@small")
    folder = "/var/lib/edged-small/models"
    device.drop("/usr/share/edged/examples/digits", "digits", folder)
    device.await_models({"digits"}, ENDPOINT_SMALL)
    device.sh("fallocate -l 9m /var/lib/edged-small/filler")
    device.drop("/opt/models/large.onnx", "large.onnx", folder)

    def refused() -> list[dict[str, object]]:
        return [
            r
            for r in device.journal("MODEL=large", unit="edged@small")
            if "free on the disk" in json.dumps(r)
        ]

    said = until(refused, what="a refusal with figures", timeout_s=SERVE_S)
    device.box.run(["dd", "if=/dev/zero", "of=/var/lib/edged-small/filler2", "bs=64k"], check=False)
    assert "label" in device.sh(
        f"edgectl --endpoint {ENDPOINT_SMALL} infer digits --json -i image=@/opt/models/image.npy",
        user="asker",
    )
    assert device.show("ActiveState", "edged@small") == "active"
    device.sh("rm /var/lib/edged-small/filler /var/lib/edged-small/filler2")
    device.sh(f"edgectl --endpoint {ENDPOINT_SMALL} load large", user="boss")
    device.await_models({"digits", "large"}, ENDPOINT_SMALL)
    device.sh("systemctl stop edged@small && umount /var/lib/edged-small && rm -r /etc/edged-small")
    device.sh("rm -rf /var/lib/edged-small /var/cache/edged-small /run/edged-small")
    return str(said[-1].get("DETAIL") or said[-1].get("REASON"))[:110]


@check("a device whose permission is taken away is named, with the group to join")
def permission(device: Device) -> str:
    # No accelerator is here, and the box may make no device nodes, so a plain file stands for one: what is
    # proved is that the service may open what its groups may, and says which group it lacks.
    device.stop_app()  # what the daemon's last life found is tried again when it has nothing else to do
    device.sh("touch /dev/nvidia0 && chmod 660 /dev/nvidia0 && groupadd gpus")
    allowed = _verdict_with_group(device, "video", "not_installed")
    refused = _verdict_with_group(device, "gpus", "no_permission")
    device.sh("rm /dev/nvidia0 && groupdel gpus")
    device.restart()
    device.start_app()
    assert "edged-runtime-cuda" in allowed["hint"], allowed
    assert "usermod -aG gpus edged" in refused["hint"], refused
    return f"(a plain file as its node) {refused['hint']}"


def _verdict_with_group(device: Device, group: str, status: str) -> dict[str, str]:
    device.sh(f"chgrp {group} /dev/nvidia0")
    device.restart()
    device.await_models(_models())

    def verdict() -> dict[str, str]:
        rows = device.devices()
        return next((row for row in rows if (row["device"], row["status"]) == ("CUDA:0", status)), {})

    return until(verdict, what=f"CUDA:0 to be {status}", timeout_s=SERVE_S)


# ---- restarts, stops, rest ------------------------------------------------------------------------------


@check("restart under an app that has the socket directory bind-mounted")
def restart(device: Device) -> str:
    inode = device.sh("stat -c %i /run/edged")
    app = device.show("MainPID", "app")
    old = device.pid()
    device.sh("systemctl restart edged")
    device.await_other_pid(old)
    device.await_answers(20)
    assert device.sh("stat -c %i /run/edged") == inode, "the directory was made anew"
    assert device.show("MainPID", "app") == app, "the app was restarted"
    micros = int(device.show("ActiveEnterTimestampMonotonic")) - int(
        device.show("ExecMainStartTimestampMonotonic")
    )
    return f"the same app went on; start to READY {micros / 1e6:.2f} s with two models"


@check("systemctl stop holds, though clients go on trying")
def stop(device: Device) -> str:
    device.sh("systemctl stop edged")
    time.sleep(3)
    assert device.show("ActiveState") == "inactive"
    assert device.sh("pgrep -u edged || true") == "", "processes are left"
    done = device.box.run(["edgectl", "models"], user="asker", check=False)
    assert done.returncode == 3, done
    device.sh("systemctl start edged")
    device.await_models(_models())
    device.await_answers(10)
    return "no process left; edgectl ends with 3"


@check("at rest: memory, processor, writes")
def rest(device: Device) -> str:
    device.stop_app()
    device.sh("systemctl restart edged")
    device.await_models(_models())

    def used() -> tuple[int, float]:
        written = ticks = 0
        for pid in device.processes():
            written += int(
                re.findall(r"^write_bytes: (\d+)", device.sh(f"cat /proc/{pid}/io"), re.MULTILINE)[0]
            )
            fields = device.sh(f"cat /proc/{pid}/stat").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return written, ticks / os.sysconf("SC_CLK_TCK")

    def calm() -> bool:
        before = used()
        time.sleep(5)
        return used()[0] == before[0]

    until(calm, what="measurements of the first minutes to end", timeout_s=SERVE_S)
    before = used()
    time.sleep(REST_S)
    written, cpu_s = (now - then for now, then in zip(used(), before, strict=True))
    pss = rss = 0
    for pid in device.processes():
        rolled = device.sh(f"cat /proc/{pid}/smaps_rollup")
        pss += int(re.findall(r"^Pss: +(\d+)", rolled, re.MULTILINE)[0])
        if pid == device.pid():
            rss = int(re.findall(r"^Rss: +(\d+)", rolled, re.MULTILINE)[0])
    assert written == 0, f"{written} bytes were written in {REST_S} s of rest"
    assert rss < 50_000, f"the supervisor has {rss} KiB"
    device.start_app()
    return (
        f"daemon {rss / 1024:.0f} MiB, all {len(device.processes())} processes {pss / 1024:.0f} MiB (PSS); "
        f"{written * 3600 // REST_S} bytes an hour written; {100 * cpu_s / REST_S:.1f} % of a processor"
    )


# ---- packages come and go -------------------------------------------------------------------------------


@check("a runtime comes and goes: OpenVINO beside ONNX Runtime")
def openvino(device: Device) -> str:
    seen = []
    for command, wanted in (
        (lambda: device.install("/packages/1/edged-runtime-openvino_*.deb"), "ok"),
        (lambda: device.sh("apt-get purge -y edged-runtime-openvino", timeout_s=120), "not_installed"),
    ):
        old = device.pid()
        command()
        device.await_other_pid(old)

        def verdict(wanted: str = wanted) -> bool:
            rows = json.loads(device.sh("edgectl --json devices", user="boss"))["devices"]
            return any(
                r["status"] == wanted for r in rows if (r["runtime"], r["device"]) == ("openvino", "CPU")
            )

        until(verdict, what=f"openvino on the CPU to be {wanted}", timeout_s=SERVE_S)
        device.await_models(_models())
        seen.append(wanted)
    assert not device.sh("ls -A /usr/lib/edged/runtimes/openvino 2>/dev/null || true")
    device.await_answers(10)
    return f"{' then '.join(seen)}, by dpkg's trigger; the app went on"


@check("upgrade under load, without losing a model")
def upgrade(device: Device) -> str:
    old, before = device.pid(), device.report()
    device.install(
        "/packages/2/edged_*.deb", "/packages/2/edged-runtime-cpu_*.deb", "/packages/2/python3-*.deb"
    )
    device.await_other_pid(old)
    assert device.sh("dpkg-query -W -f '${Version}' edged").partition("-")[2].startswith("2")
    device.await_models(_models())
    after = device.await_answers(20)
    errors = sum(sum(c["errors"].values()) - sum(before[n]["errors"].values()) for n, c in after.items())
    right = sum(c["right"] - before[n]["right"] for n, c in after.items())
    return f"the same versions and contents; the app had {right} answers and {errors} typed errors meanwhile"


@check("reboot: the same models serve")
def reboot(device: Device) -> str:
    device.stop_app()
    device.box.reboot()
    device.await_models(_models())
    micros = int(device.show("ActiveEnterTimestampMonotonic")) - int(
        device.sh("systemctl show --value -p UserspaceTimestampMonotonic")
    )
    device.start_app()
    return f"READY {micros / 1e6:.1f} s after the system's first process"


@check("remove keeps models, state and settings; what is installed again serves them")
def remove(device: Device) -> str:
    device.stop_app()
    device.box.write("/etc/edged/edged.toml", "[store]\nkeep_versions = 3\n")
    device.sh("apt-get remove -y edged edged-runtime-cpu", timeout_s=120)
    assert device.sh("pgrep -u edged || true") == "", "processes are left"
    left = device.sh("find /usr/lib/edged /lib/systemd/system -path '*edged*' 2>/dev/null || true")
    assert left == "", f"left behind: {left}"
    assert device.sh("ls /var/lib/edged/models").split() == ["digits", "mlp.onnx"]
    device.install("/packages/2/edged_*.deb", "/packages/2/edged-runtime-cpu_*.deb")
    device.await_models(_models())
    assert "keep_versions = 3" in device.sh("cat /etc/edged/edged.toml")
    return "the same versions and contents after it"


@check("purge leaves nothing but the user and the groups")
def purge(device: Device) -> str:
    device.sh("apt-get purge -y edged edged-runtime-cpu python3-edged-client", timeout_s=120)
    known = _state["files"]
    assert isinstance(known, set)
    ours = {"opt/app.py", "opt/models", "packages", "etc/systemd/system/app.service", "var/lib/app"}
    left = {
        path
        for path in files(device) - known
        if not any(path == each or path.startswith(f"{each}/") for each in ours)
        # adduser's and systemd's own books.
        and not re.fullmatch(
            r"etc/(passwd|group|g?shadow|subuid|subgid)-|etc/\.pwd\.lock|var/mail/.*|var/spool/.*", path
        )
    }
    assert not left, f"left behind: {sorted(left)[:20]}"
    lost = {path for path in known - files(device) if "edged" in path}
    assert not lost, lost
    assert device.sh("getent passwd edged").endswith("/usr/sbin/nologin")
    return "compared file by file with the tree before"


def _models() -> dict[str, Model]:
    models = _state["models"]
    assert isinstance(models, dict)
    return models
