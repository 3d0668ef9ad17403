"""What `make demo` runs: the daemon from start to stop, on scratch folders, with a real model.

Each step says what it shows and whether that held; the exit status is 0 only if everything did. Nothing
outside one temporary folder is touched. Needs scikit-learn and onnx (`pip install edged[dev]`), since it
trains the second version of the network while you watch.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "models")]

import train_digits  # noqa: E402 - found by the line above
from classify_digits import picture  # noqa: E402

from edged import Client  # noqa: E402
from edged.errors import EdgedError, Unavailable  # noqa: E402

THREADS = 4
READY_TIMEOUT_S = 60
RECOVERY_TIMEOUT_S = 30
STOP_TIMEOUT_S = 15
PUT_TIMEOUT = "60"


class Report:
    """Prints the steps, and remembers what did not hold."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._step = 0

    def step(self, title: str) -> None:
        """Begins the next step."""
        self._step += 1
        print(f"\n\033[1m{self._step}. {title}\033[0m" if sys.stdout.isatty() else f"\n{self._step}. {title}")

    def check(self, held: bool, claim: str) -> None:
        """Says a claim and whether it held."""
        print(f"   {'ok  ' if held else 'FAIL'} {claim}", flush=True)
        if not held:
            self.failed.append(claim)


class Traffic:
    """Threads that classify held-out pictures one after the other, each with a client of its own.

    Counts answers by version, right answers, and errors by code and reason; a failed request is asked
    again with the next turn.
    """

    def __init__(self, endpoint: str, images: np.ndarray, labels: np.ndarray) -> None:
        self._endpoint = endpoint
        self._images, self._labels = images, labels
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self.versions: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.right = 0
        self.faults: list[BaseException] = []
        self._last_ok_sent_ns = 0
        self._threads = [threading.Thread(target=self._guarded, args=(n,)) for n in range(THREADS)]

    @property
    def answers(self) -> int:
        """How many requests were answered."""
        return sum(self.versions.values())

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, happened: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until `happened()` is true after some answer; False when the time is over."""
        with self._changed:
            return (
                self._changed.wait_for(lambda: happened() or bool(self.faults), timeout_s) and not self.faults
            )

    def wait_answer_sent_after(self, moment_ns: int, timeout_s: float) -> bool:
        """Waits for a good answer to a request that was sent after `moment_ns` of the monotonic clock."""
        return self.wait_for(lambda: self._last_ok_sent_ns > moment_ns, timeout_s)

    def _guarded(self, number: int) -> None:
        try:
            self._run(number)
        except BaseException as fault:  # noqa: BLE001 - shown by the main thread, which is waiting
            with self._changed:
                self.faults.append(fault)
                self._changed.notify_all()

    def _run(self, number: int) -> None:
        order = np.random.default_rng(number).permutation(len(self._images))
        with Client(self._endpoint) as client:
            turn = 0
            while not self._stop.is_set():
                index = order[turn % len(order)]
                turn += 1
                sent_ns = time.monotonic_ns()
                try:
                    result = client.infer("digits", {"image": self._images[index : index + 1]}, timeout=10)
                except EdgedError as error:
                    self._count_error(error)
                    if isinstance(error, Unavailable):  # as an app would: not at once again
                        self._stop.wait((error.retry_after_ms or 10) / 1000)
                    continue
                with self._changed:
                    self.versions[str(result.model_version)] += 1
                    self.right += int(result["label"][0]) == self._labels[index]
                    self._last_ok_sent_ns = max(self._last_ok_sent_ns, sent_ns)
                    self._changed.notify_all()

    def _count_error(self, error: EdgedError) -> None:
        with self._changed:
            self.errors[f"{error.code.value}/{error.reason}"] += 1
            self._changed.notify_all()


def main() -> int:
    report = Report()
    with np.load(HERE / "digits-heldout.npz") as data:
        images, labels = data["images"].astype(np.float32), data["labels"].astype(int)
    # In /tmp whatever TMPDIR says: a socket's path has 107 bytes at most.
    scratch = Path(tempfile.mkdtemp(prefix="edged-demo-", dir="/tmp"))
    try:
        with daemon(scratch, report) as endpoint:
            classify(endpoint, images, labels, report)
            swap(endpoint, scratch, images, labels, report)
            refuse(endpoint, scratch, images, report)
            crash(endpoint, images, labels, report)
            report.step("What an operator sees: edgectl status")
            report.check(edgectl(endpoint, "status") == 0, "edgectl status ended well")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print()
    for claim in report.failed:
        print(f"did not hold: {claim}")
    print("everything held" if not report.failed else f"{len(report.failed)} claims did not hold")
    return 1 if report.failed else 0


@contextmanager
def daemon(scratch: Path, report: Report) -> Iterator[str]:
    """Starts the daemon on a copy of models/, and stops it."""
    report.step("Start the daemon on a scratch copy of models/")
    shutil.copytree(ROOT / "models", scratch / "models", ignore=shutil.ignore_patterns("__pycache__"))
    (scratch / "run").mkdir(mode=0o700)
    endpoint = f"ipc://{scratch}/run/edged.sock"
    environ = {
        **os.environ,
        "EDGED_SERVER_STATE_DIR": str(scratch / "state"),
        "EDGED_SERVER_CACHE_DIR": str(scratch / "cache"),
    }
    command = [sys.executable, "-m", "edged.cli.edged"]
    command += ["--models", str(scratch / "models"), "--endpoint", endpoint]
    print(f"   $ edged --models {scratch}/models --endpoint {endpoint}")
    began = time.monotonic()
    with (scratch / "log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, cwd=ROOT
        )
    try:
        ready = wait_ready(endpoint, process)
        report.check(ready, f"serving after {time.monotonic() - began:.1f} s")
        if not ready:
            raise SystemExit((scratch / "log").read_text(errors="replace")[-4000:])
        yield endpoint
        report.step("Stop: SIGTERM")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = process.wait(STOP_TIMEOUT_S)
        report.check(code == 0, f"ended after {time.monotonic() - began:.1f} s with exit status {code}")
        left = sorted(p.name for p in (scratch / "run").glob("*.sock"))
        report.check(not left, "no socket is left behind" if not left else f"left behind: {left}")
    except BaseException:
        report.check(False, "the demo came to its end")
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if report.failed:
            print("\nthe daemon's log:\n" + (scratch / "log").read_text(errors="replace")[-8000:])


def wait_ready(endpoint: str, process: subprocess.Popen[bytes]) -> bool:
    """Asks until the digits are served; False when the daemon ends or takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    with Client(endpoint, timeout=2) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.server_ready() and client.model_ready("digits"):
                    return True
            except EdgedError:
                pass  # not there yet
            time.sleep(0.05)
    return False


def classify(endpoint: str, images: np.ndarray, labels: np.ndarray, report: Report) -> None:
    """Three pictures one by one for the eye, then all of them in one batch for the score."""
    report.step("Classify handwritten digits that the network has never seen")
    with Client(endpoint) as client:
        client.infer("digits", {"image": images[:1]})
        for image, label in zip(images[:3], labels, strict=False):
            began = time.perf_counter_ns()
            result = client.infer("digits", {"image": image[np.newaxis]})
            took_us = (time.perf_counter_ns() - began) // 1000
            answer = int(result["label"][0])
            lines = picture(image).splitlines()
            lines[1] += f"     reads {answer}, {result['probabilities'][0, answer]:.0%} sure; it is {label}"
            lines[3] += f"     {result.device} by {result.runtime}, precision {result.precision}"
            lines[4] += f"     round trip {took_us} µs, of which the network {result.compute_us} µs"
            print("\n".join(f"   |{line}" for line in lines), end="\n\n")
        result = client.infer("digits", {"image": images})
    right = int((result["label"] == labels).sum())
    report.check(right > 0.95 * len(labels), f"all {len(labels)} in one batch: {right} right")


def swap(endpoint: str, scratch: Path, images: np.ndarray, labels: np.ndarray, report: Report) -> None:
    """Trains the network anew and puts it into the folder while requests keep coming."""
    report.step(f"Swap the network while {THREADS} clients keep asking")
    trained = train_digits.train(seed=train_digits.SEED + 1)
    fresh = scratch / "fresh" / "digits"
    shutil.copytree(ROOT / "models" / "digits", fresh)
    train_digits.write_bundle(fresh, trained)
    print(f"   trained anew from another seed: {trained.accuracy:.1%} of the held-out pictures right")
    with Traffic(endpoint, images, labels) as traffic:
        traffic.wait_for(lambda: traffic.answers > 200, RECOVERY_TIMEOUT_S)
        before = set(traffic.versions)
        code = edgectl(
            endpoint,
            "put",
            str(fresh),
            "--models",
            str(scratch / "models"),
            "--wait",
            "--timeout",
            PUT_TIMEOUT,
        )
        asked = traffic.answers
        traffic.wait_for(lambda: traffic.answers > asked + 200, RECOVERY_TIMEOUT_S)
    report.check(code == 0, "edgectl put --wait says that it serves")
    report.check(not traffic.faults, f"no client fell over{shown(traffic.faults)}")
    counts = ", ".join(f"version {v}: {n}" for v, n in sorted(traffic.versions.items()))
    report.check(len(set(traffic.versions) - before) == 1, f"answers by both versions ({counts})")
    report.check(
        not traffic.errors,
        f"{traffic.answers} requests, {traffic.errors.total()} failed{shown(traffic.errors)}",
    )
    share = traffic.right / max(1, traffic.answers)
    report.check(share > 0.95, f"{share:.1%} of the answers right throughout")


def refuse(endpoint: str, scratch: Path, images: np.ndarray, report: Report) -> None:
    """Puts a network into the folder that loads but reads the golden pictures wrong."""
    report.step("Drop in a network that went bad: its golden samples refuse it")
    bad = scratch / "bad" / "digits"
    shutil.copytree(scratch / "models" / "digits", bad)
    model = onnx.load(str(bad / "model.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name == "weight_2":  # the classes in the wrong order, as a mixed-up export would have them
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor)[:, ::-1].copy(), tensor.name)
            )
    onnx.save(model, str(bad / "model.onnx"))
    with Client(endpoint) as client:
        before = client.infer("digits", {"image": images[:1]})
        code = edgectl(
            endpoint, "put", str(bad), "--models", str(scratch / "models"), "--wait", "--timeout", PUT_TIMEOUT
        )
        after = client.infer("digits", {"image": images[:1]})
    report.check(code == 1, f"edgectl put --wait says that it was refused (exit status {code})")
    same = before.model_version == after.model_version
    report.check(same, f"version {before.model_version} goes on serving")


def crash(endpoint: str, images: np.ndarray, labels: np.ndarray, report: Report) -> None:
    """Kills the model's worker process under traffic."""
    report.step("Kill the model's worker process, as a driver's crash would")
    with Client(endpoint) as client, Traffic(endpoint, images, labels) as traffic:
        traffic.wait_for(lambda: traffic.answers > 200, RECOVERY_TIMEOUT_S)
        pid = worker_pid(client)
        print(f"   $ kill -9 {pid}")
        killed_ns = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        traffic.wait_for(lambda: bool(traffic.errors), 2.0)  # nothing may have been in flight just then
        back = traffic.wait_answer_sent_after(time.monotonic_ns(), RECOVERY_TIMEOUT_S)
        took_ms = (time.monotonic_ns() - killed_ns) / 1e6
        fresh = worker_pid(client)
    report.check(
        back and fresh != pid, f"answers again {took_ms:.0f} ms after the kill, from a new worker {fresh}"
    )
    typed = not traffic.faults and all(key.startswith("UNAVAILABLE/") for key in traffic.errors)
    report.check(typed, f"what was in flight got a typed error{shown(traffic.errors)}{shown(traffic.faults)}")


def worker_pid(client: Client) -> int:
    """The process that serves the digits; the daemon names it."""
    models = client.server_status()["models"]
    return int(next(m["pid"] for m in models if m["name"] == "digits" and m["serving"] and m["pid"]))


def shown(things: object) -> str:
    """In brackets, if there is anything."""
    if isinstance(things, Counter):
        return f" ({', '.join(f'{key}: {n}' for key, n in things.items())})" if things else ""
    return f" ({things})" if things else ""


def edgectl(endpoint: str, *arguments: str) -> int:
    """Runs edgectl, its output indented; returns its exit status."""
    print(f"   $ edgectl {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "edged.cli.edgectl", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "EDGED_ENDPOINT": endpoint},
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    print("".join(f"   {line}\n" for line in done.stdout.splitlines()), end="", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
