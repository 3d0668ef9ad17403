"""What dpkg is told: the control file, checksums, scripts, changelog and copyright."""

from __future__ import annotations

import hashlib
import os
import textwrap
from collections.abc import Mapping, Sequence
from email.utils import formatdate

from tree import HERE, PREFIX, Build, Tree

MAINTAINER = "edged maintainers <edged@packages.invalid>"
"""Who is named when DEBFULLNAME and DEBEMAIL do not say."""


def write_control(
    build: Build,
    tree: Tree,
    *,
    name: str,
    scripts: str,
    arch: str,
    conffiles: Sequence[str],
    fields: Mapping[str, str],
    description: tuple[str, str],
) -> None:
    """The DEBIAN directory: fields, checksums, conffiles and the maintainer's scripts."""
    everything = sorted(tree.root.rglob("*"))
    files = [p for p in everything if p.is_file() and not p.is_symlink()]
    # As dpkg-gencontrol counts: files in whole KiB, and one for everything else.
    size_kib = sum(-(-p.stat().st_size // 1024) for p in files) + len(everything) - len(files)
    rows = {
        "Package": name,
        "Source": "edged",
        "Version": build.version,
        "Architecture": arch,
        "Maintainer": maintainer(),
        "Installed-Size": str(size_kib),
        **fields,
        "Priority": "optional",
        "Description": f"{description[0]}\n{_paragraphs(description[1])}",
    }
    tree.put("DEBIAN/control", "".join(f"{key}: {value}\n" for key, value in rows.items()))
    sums = {p: hashlib.md5(p.read_bytes(), usedforsecurity=False).hexdigest() for p in files}
    tree.put("DEBIAN/md5sums", "".join(f"{sums[p]}  {p.relative_to(tree.root)}\n" for p in files))
    if conffiles:
        tree.put("DEBIAN/conffiles", "".join(f"{path}\n" for path in conffiles))
    for script in sorted((HERE / "scripts" / scripts).iterdir()):
        text = script.read_text("utf-8").replace("@PACKAGE@", name).replace("@PYTHON@", build.release.python)
        tree.put(f"DEBIAN/{script.name}", text, 0o644 if script.name == "triggers" else 0o755)


def maintainer() -> str:
    """Who answers for the package, by Debian's usual variables."""
    name, address = os.environ.get("DEBFULLNAME"), os.environ.get("DEBEMAIL")
    return f"{name} <{address}>" if name and address else MAINTAINER


def _paragraphs(text: str) -> str:
    paragraphs = [textwrap.fill(p, 78) for p in text.split("\n\n")]
    return "\n".join(f" {line}" if line else " ." for line in "\n\n".join(paragraphs).split("\n"))


def changelog_text(build: Build) -> str:
    """Debian's changelog: one entry, which points at the project's own."""
    return (
        f"edged ({build.version}) {build.release_name}; urgency=medium\n\n"
        "  * What has changed for users is in CHANGELOG.md of the sources.\n\n"
        f" -- {maintainer()}  {formatdate(build.epoch)}\n"
    )


def copyright_text(package: str, tree: Tree) -> str:
    """Debian's machine-readable copyright file, with where each wheel's own texts are."""
    text = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: edged
Comment: Libraries of others are included as their makers published them. Each one's
 licence is named below as its metadata has it; the texts, with those of what it
 includes in its turn, are in licenses/ beside this file. wheels.sha256 has the exact files.

Files: *
Copyright: 2026 the edged authors
License: Apache-2.0
 On Debian systems the text is in /usr/share/common-licenses/Apache-2.0.
"""
    for name, _, licence in tree.wheels:
        distribution, version = name.split("-")[:2]
        if distribution != "edged":
            text += (
                f"\nFiles: {PREFIX}/*/{distribution}/*\n"
                f"Copyright: 2026 the {distribution} authors, and those that its texts name\n"
                f"License: {distribution}-{version}\n {licence}. The texts are in\n"
                f" /usr/share/doc/{package}/licenses/{distribution}/.\n"
            )
    return text
