#!/usr/bin/env python3
"""Builds edged's Debian packages, for this machine's architecture or another, as any user.

    python packaging/deb/build.py [--release bookworm] [--arch amd64] [--only edged ...] [--out dist/deb]

Nothing that is packaged is run: wheels are fetched by pip for the release's Python and the architecture,
unpacked, thinned out, and put together with `dpkg-deb`. So arm64 is built on any machine. The same sources,
versions of wheels and SOURCE_DATE_EPOCH (the last commit's time, unless it is set) give the same bytes. Needs
Python 3.11, pip, dpkg-deb, and the network or a cache of the wheels (EDGED_DEB_CACHE, ~/.cache/edged-deb).

Exit codes: 0 built, 1 a fault of the sources, 69 no dpkg-deb, 75 wheels could not be fetched.

packaging/README.md says what the packages are and why they are made this way.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from control import changelog_text, copyright_text, write_control
from elf import shared_libraries
from tree import HERE, MACHINES, PACKAGING, PREFIX, RELEASES, ROOT, Build, BuildError, Tree, Unreachable
from wheels import fate, fetch, own_wheel, unpack

DPKG_TIMEOUT_S = 900
"""Of packing one package: 350 MB with xz, on a slow machine."""

__all__ = ["BuildError", "client_modules", "fate", "main", "shared_libraries"]

REVISION = "1"
"""Of the packaging; `--revision` builds a later one of the same sources."""


@dataclass(frozen=True)
class Package:
    """One package: what makes its tree, and its control file's fields."""

    name: str
    summary: str
    description: str
    depends: tuple[str, ...]
    fill: Callable[[Build, Tree], None]
    fields: tuple[tuple[str, str], ...] = ()
    conffiles: tuple[str, ...] = ()
    scripts: str = "runtime"
    """The directory in `scripts/` with the maintainer's scripts."""
    per_arch: bool = True
    machines: tuple[str, ...] = tuple(MACHINES)


# ---- what is in each package ----------------------------------------------------------------------------

DAEMON = """\
#!/{prefix}/bin/python -IB
import sys

from edged.cli.{module} import main

sys.exit(main())
"""
"""-I: nothing from the caller's environment or home; -B: nobody who runs this writes beside the code."""


def fill_edged(build: Build, tree: Tree) -> None:
    """The environment with the supervisor, the client and edgectl; the unit and all that belongs to it."""
    python = build.release.python
    for wheel in (*fetch(build, "edged"), own_wheel(build)):
        unpack(tree, wheel, build.sites, "usr/share/doc/edged")
    tree.put(
        f"{PREFIX}/pyvenv.cfg",
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\n",
    )
    tree.link(f"{PREFIX}/bin/python", f"../../../bin/python{python}")
    for module in ("edged", "edgectl"):
        tree.put(f"{PREFIX}/bin/{module}", DAEMON.format(prefix=PREFIX, module=module), 0o755)
        tree.link(f"usr/bin/{module}", f"../lib/edged/bin/{module}")
    (tree.root / PREFIX / "runtimes").mkdir()

    units = build.release.units
    tree.copy(ROOT / "edged.service", f"{units}/edged.service")
    tree.copy(PACKAGING / "edged@.service", f"{units}/edged@.service")
    tree.copy(PACKAGING / "sysusers.conf", "usr/lib/sysusers.d/edged.conf")
    tree.copy(PACKAGING / "tmpfiles.conf", "usr/lib/tmpfiles.d/edged.conf")
    tree.copy(PACKAGING / "edged.catalog", "usr/lib/systemd/catalog/edged.catalog")
    tree.copy(PACKAGING / "edged.toml", "etc/edged/edged.toml")
    tree.copy(PACKAGING / "completion/edgectl.bash", "usr/share/bash-completion/completions/edgectl")
    tree.copy(PACKAGING / "completion/_edgectl", "usr/share/zsh/vendor-completions/_edgectl")
    documents = "usr/share/doc/edged"
    for page in ("operating.md", "configuration.md", "protocol.md", "architecture.md"):
        tree.copy(ROOT / "docs" / page, f"{documents}/{page}")
    for drop_in in sorted((PACKAGING / "edged.service.d").glob("*.conf")):
        tree.copy(drop_in, f"{documents}/examples/edged.service.d/{drop_in.name}")
    for name in ("edged.rules.yml", "metrics-http.conf"):
        tree.copy(PACKAGING / "prometheus" / name, f"{documents}/examples/prometheus/{name}")
    tree.copy(PACKAGING / "edged-alarm@.service", f"{documents}/examples/edged-alarm@.service")
    tree.copy(PACKAGING / "nvidia-modules-load.conf", f"{documents}/examples/nvidia-modules-load.conf")
    for item in sorted((ROOT / "models/digits").rglob("*")):
        if item.is_file():
            tree.copy(item, f"usr/share/edged/examples/digits/{item.relative_to(ROOT / 'models/digits')}")
    if (ROOT / "edged/cli/man.py").exists():
        put_man_pages(build, tree)


def put_man_pages(build: Build, tree: Tree) -> None:
    """The manual pages, made from the same source as `--help`."""
    pages = build.work / "man"
    done = subprocess.run(
        [build.python, "-m", "edged.cli.man", str(pages)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if done.returncode:
        raise BuildError(f"the manual pages cannot be made:\n{done.stderr[-2000:]}")
    for page in sorted(pages.iterdir()):
        target = tree.root / f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(page.read_bytes(), 9, mtime=build.epoch))


def runtime(name: str) -> Callable[[Build, Tree], None]:
    """A runtime in its own site directory."""

    def fill(build: Build, tree: Tree) -> None:
        for wheel in fetch(build, name):
            unpack(tree, wheel, f"{PREFIX}/runtimes/{name}", f"usr/share/doc/edged-runtime-{name}")

    return fill


def fill_client(build: Build, tree: Tree) -> None:
    """The client's modules alone, where Debian's own Python looks."""
    site = "usr/lib/python3/dist-packages"
    for module in sorted(client_modules()):
        parts = module.split(".")
        source = ROOT.joinpath(*parts)
        inside = "/".join(parts)
        if source.is_dir():
            tree.copy(source / "__init__.py", f"{site}/{inside}/__init__.py")
        else:
            tree.copy(source.with_suffix(".py"), f"{site}/{inside}.py")
    tree.copy(ROOT / "edged/py.typed", f"{site}/edged/py.typed")
    upstream = build.version.partition("-")[0]
    tree.put(
        f"{site}/edged-{upstream}.dist-info/METADATA",
        f"Metadata-Version: 2.1\nName: edged\nVersion: {upstream}\nSummary: The client of edged\n"
        "Requires-Dist: msgpack\nRequires-Dist: numpy\nRequires-Dist: pyzmq\n",
    )
    for example in ("req_client.py", "async_client.py", "onnxruntime_drop_in.py", "classify_digits.py"):
        tree.copy(ROOT / "examples" / example, f"usr/share/doc/python3-edged-client/examples/{example}")


def client_modules() -> set[str]:
    """All modules that `import edged` can come to, by reading their imports."""
    wanted = ["edged", *(f"edged.{m}" for m in ("asyncclient", "client", "session", "lease"))]
    found: set[str] = set()
    while wanted:
        module = wanted.pop()
        if module in found:
            continue
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.exists():
            continue  # a name in a module, not a module
        found.add(module)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                wanted += [a.name for a in node.names if a.name.startswith("edged")]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edged"):
                wanted += [str(node.module), *(f"{node.module}.{a.name}" for a in node.names)]
    return found


# ---- what dpkg is told ----------------------------------------------------------------------------------


def packages(build: Build) -> tuple[Package, ...]:
    """The packages of one build, with what they need."""
    python = build.release.python
    this_python = (f"python3 (>= {python}~)", f"python3 (<< {build.release.next_python}~)")
    same = f"edged (= {build.version})"
    return (
        Package(
            name="edged",
            summary="inference daemon for edge devices",
            description="""\
edged serves the machine-learning models in a folder to the apps on this device, over a local socket. It
finds out which runtime and accelerator is the fastest for each model, keeps serving while a new version is
brought in, and goes on when a model crashes.

This package has the daemon, edgectl, the system service, and the libraries that they need, in an environment
of their own. What runs models is in edged-runtime-cpu, edged-runtime-openvino and edged-runtime-cuda.""",
            # systemd makes the user, the directories and the journal's catalog.
            depends=(*this_python, "systemd (>= 252)"),
            fill=fill_edged,
            fields=(("Recommends", "edged-runtime-cpu | edged-runtime-openvino | edged-runtime-cuda"),),
            conffiles=("/etc/edged/edged.toml",),
            scripts="edged",
        ),
        Package(
            name="edged-runtime-cpu",
            summary="ONNX Runtime for edged",
            description="ONNX Runtime, with which edged runs ONNX models on the processor.",
            depends=(same,),
            fill=runtime("cpu"),
        ),
        Package(
            name="edged-runtime-openvino",
            summary="OpenVINO for edged",
            description="""\
OpenVINO, with which edged runs ONNX and OpenVINO IR models on processors, and on Intel's GPUs and NPUs. For
a GPU or NPU its driver is needed, too: intel-opencl-icd, or Intel's packages for the NPU.""",
            depends=(same,),
            fill=runtime("openvino"),
        ),
        Package(
            name="edged-runtime-cuda",
            summary="ONNX Runtime with CUDA for edged",
            description="""\
ONNX Runtime with CUDA, with which edged runs ONNX models on NVIDIA's GPUs. NVIDIA's driver and its libraries
(CUDA 13 and cuDNN 9) are needed, too. It can be installed beside edged-runtime-cpu, and is then used in its
place, for the processor, too.""",
            depends=(same,),
            fill=runtime("cuda"),
            machines=("amd64",),  # no wheel is published for arm64's C library here
        ),
        Package(
            name="python3-edged-client",
            summary="client of the edged inference daemon (Python 3)",
            description="""\
The Python module edged, with which apps ask the inference daemon of this device: Client, AsyncClient, and
InferenceSession in place of ONNX Runtime's. It needs neither a runtime nor the daemon's package.""",
            depends=("python3 (>= 3.11~)", "python3-msgpack", "python3-numpy", "python3-zmq"),
            fill=fill_client,
            fields=(("Section", "python"),),
            scripts="client",
            per_arch=False,
        ),
    )


def assemble(build: Build, package: Package, out: Path) -> tuple[Path, Tree]:
    """Makes one package's file."""
    tree = Tree(build.work / package.name)
    tree.root.mkdir()
    package.fill(build, tree)
    documents = f"usr/share/doc/{package.name}"
    tree.put(f"{documents}/copyright", copyright_text(package.name, tree))
    if tree.wheels:
        listed = "".join(f"{digest}  {name}\n" for name, digest, _ in tree.wheels)
        tree.put(f"{documents}/wheels.sha256", listed)
    changes = gzip.compress(changelog_text(build).encode(), 9, mtime=build.epoch)
    (tree.root / documents / "changelog.Debian.gz").write_bytes(changes)
    overrides = HERE / "lintian" / package.name
    if overrides.exists():
        tree.copy(overrides, f"usr/share/lintian/overrides/{package.name}")
    needed = shared_libraries(tree.root, build.release.glibc)
    write_control(
        build,
        tree,
        name=package.name,
        scripts=package.scripts,
        arch=build.arch if package.per_arch else "all",
        conffiles=package.conffiles,
        fields={
            "Depends": ", ".join(dict.fromkeys((*package.depends, *needed))),
            "Section": "science",
            **dict(package.fields),
        },
        description=(package.summary, package.description),
    )
    _normalise(tree.root, build.epoch)
    arch = build.arch if package.per_arch else "all"
    target = out / f"{package.name}_{build.version}_{arch}.deb"
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", *COMPRESSION[build.compression], "--build", tree.root, target],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(build.epoch)},
        timeout=DPKG_TIMEOUT_S,
    )
    return target, tree


COMPRESSION = {
    "small": ("-Zxz", "-z6"),
    "quick": ("-Zgzip", "-z1"),
}
"""For those who fetch a package, and for tests that build one and throw it away."""


def _normalise(root: Path, epoch: int) -> None:
    """Modes and times that do not depend on who built it, and when."""
    for path in (root, *root.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


# ---- the command line -----------------------------------------------------------------------------------


def table(made: Iterable[tuple[Path, Tree]]) -> str:
    """Where the bytes go, for people: each package, and its largest parts."""
    lines = []
    for path, tree in made:
        parts: dict[str, int] = {}
        total = 0
        for each in tree.root.rglob("*"):
            if each.is_file() and not each.is_symlink() and "DEBIAN" not in each.parts:
                size = each.stat().st_size
                inside = each.relative_to(tree.root).as_posix()
                total += size
                parts[_part(inside)] = parts.get(_part(inside), 0) + size
        lines.append(
            f"{path.name}: {total / 1e6:.1f} MB installed, {path.stat().st_size / 1e6:.1f} MB to fetch"
        )
        for name, size in sorted(parts.items(), key=lambda item: -item[1]):
            if size > 500_000:
                lines.append(f"    {size / 1e6:7.1f} MB  {name}")
        for reason, size in sorted(tree.dropped_bytes.items(), key=lambda item: -item[1]):
            if size > 500_000:
                lines.append(f"   -{size / 1e6:7.1f} MB  left out: {reason}")
    return "\n".join(lines)


def _part(path: str) -> str:
    found = re.match(r".*?(?:site-packages|dist-packages|runtimes/[^/]+)/([^/]+)", path)
    return found[1].removesuffix(".libs") if found else path.partition("/edged/")[0]


def default_epoch() -> int:
    """SOURCE_DATE_EPOCH, else the last commit's time, else the changelog's."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout.strip():
        return int(done.stdout)
    return int((ROOT / "CHANGELOG.md").stat().st_mtime)


def host_arch() -> str:
    """This machine's architecture, as Debian calls it."""
    machine = os.uname().machine
    return next((arch for arch, name in MACHINES.items() if name == machine), "amd64")


def main(argv: Sequence[str] | None = None) -> int:
    """Builds what was asked for; prints where it is and what it weighs."""
    parser = argparse.ArgumentParser(description="Build edged's Debian packages.")
    parser.add_argument("--release", choices=RELEASES, default="bookworm")
    parser.add_argument("--arch", choices=MACHINES, default=host_arch())
    parser.add_argument("--revision", default=REVISION, help="of the packaging (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="these packages alone")
    parser.add_argument("--out", type=Path, default=ROOT / "dist/deb")
    parser.add_argument("--compression", choices=COMPRESSION, default="small")
    args = parser.parse_args(argv)
    if shutil.which("dpkg-deb") is None:
        parser.exit(69, "dpkg-deb is missing: on Debian it is in the package dpkg\n")
    version = re.search(r'"(.+?)"', (ROOT / "edged/version.py").read_text().partition("__version__")[2])
    assert version is not None
    release = RELEASES[args.release]
    os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="edged-deb-") as scratch:
        build = Build(
            release=release,
            release_name=args.release,
            arch=args.arch,
            version=f"{version[1]}-{args.revision}{release.suffix}",
            epoch=default_epoch(),
            cache=Path(os.environ.get("EDGED_DEB_CACHE") or Path.home() / ".cache/edged-deb"),
            work=Path(scratch),
            compression=args.compression,
        )
        try:
            made = [
                assemble(build, package, args.out)
                for package in packages(build)
                if build.arch in package.machines and (not args.only or package.name in args.only)
            ]
            print(table(made))
        except (BuildError, Unreachable) as e:
            print(f"build.py: {e}", file=sys.stderr)
            return 75 if isinstance(e, Unreachable) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
