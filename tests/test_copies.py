"""A stored copy is what its name says, or it is found out: by one bit, one byte, one file, one link."""

from __future__ import annotations

import hashlib
import os
import resource
from pathlib import Path

import pytest

from edged.copies import (
    DamagedCopyError,
    bundle_digest,
    check_copy,
    content_bytes,
    hash_file,
    looks_whole,
    read_manifest,
)
from edged.repository import scan
from edged.store import Store

FILES = {
    "net/model.xml": b"<net/>",
    "net/model.bin": bytes(range(256)) * 9000,
    "net/golden/0.json": b'{"inputs": {}, "outputs": {"y": [1.0]}}',
}
"""An OpenVINO IR with a golden sample; the weights are more than is read at once."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The stored copy of FILES."""
    root = tmp_path / "models"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    with Store(tmp_path / "state", keep_versions=1, max_bytes=None, disk_free_min_bytes=0) as store:
        staged = store.stage(root, scan(root).entries["net", None])
        return store.copy_path(staged.digest)


def flip(path: Path, at: int) -> None:
    """One bit of a file changes."""
    path.chmod(0o640)
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
    path.chmod(0o440)


def test_a_sound_copy_passes(copy: Path) -> None:
    """Its name is made of what it holds."""
    check_copy(copy)
    manifest = read_manifest(copy)
    assert bundle_digest(manifest) == copy.name
    assert content_bytes(manifest) == sum(map(len, FILES.values()))


@pytest.mark.parametrize("name", ["model.xml", "model.bin", "golden/0.json"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_bit_of_any_file_is_found(copy: Path, name: str, where: str) -> None:
    """In the graph, the weights or a golden sample, and nothing but reading shows it."""
    size = len(FILES[f"net/{name}"])
    flip(copy / "files" / name, {"first": 0, "middle": size // 2, "last": size - 1}[where])
    assert looks_whole(copy)
    with pytest.raises(DamagedCopyError, match=f"{name} has other bytes than were stored"):
        check_copy(copy)


def test_one_bit_of_the_manifest_is_found(copy: Path) -> None:
    """Wherever it is: the name must still come out, and the list must still be JSON."""
    manifest = copy / "manifest.json"
    good = manifest.read_bytes()
    manifest.chmod(0o640)
    for at in range(0, len(good), 7):
        manifest.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        assert read_manifest(copy) == {}
        assert not looks_whole(copy)
        with pytest.raises(DamagedCopyError, match="manifest"):
            check_copy(copy)


def test_a_file_that_is_not_ours_alone_is_found(copy: Path, tmp_path: Path) -> None:
    """Gone, cut, linked a second time, or a link itself."""
    file = copy / "files/model.bin"
    os.link(file, tmp_path / "second")
    assert not looks_whole(copy)
    with pytest.raises(DamagedCopyError, match="alone"):
        check_copy(copy)
    file.unlink()
    file.symlink_to(tmp_path / "second")
    assert not looks_whole(copy)
    with pytest.raises(DamagedCopyError, match="cannot be read"):
        check_copy(copy)
    file.unlink()
    assert not looks_whole(copy)
    with pytest.raises(DamagedCopyError, match="No such file"):
        check_copy(copy)
    (copy / "manifest.json").rename(copy / "aside")
    with pytest.raises(DamagedCopyError, match=r"manifest.json cannot be read: No such file"):
        check_copy(copy)
    (copy / "aside").rename(copy / "manifest.json")
    file.write_bytes(b"short")
    assert not looks_whole(copy)
    with pytest.raises(DamagedCopyError, match="has 5 bytes, 2304000 were stored"):
        check_copy(copy)


def test_a_fault_of_the_process_is_no_damage(copy: Path) -> None:
    """With no descriptor left nothing is known of the copy, so it must not be given up."""
    check_copy(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        with pytest.raises(OSError, match="Too many open files"):
            check_copy(copy)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    check_copy(copy)


def test_a_hash_is_of_the_whole_file_wherever_it_stands(tmp_path: Path) -> None:
    """By descriptor, and the descriptor's position stays."""
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "f").write_bytes(data)
    with (tmp_path / "f").open("rb", buffering=0) as stream:
        stream.seek(5)
        assert hash_file(stream.fileno()) == hashlib.sha256(data).hexdigest()
        assert stream.tell() == 5
