"""The models folder: what is found in it, and what of that has changed and come to rest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edged.repository import (
    IGNORED_SUFFIXES,
    Entry,
    Folder,
    FolderChanges,
    Snapshot,
    UnsafeFileError,
    open_regular,
    scan,
)

SETTLE_S = 1.0
DOCUMENT = Path(__file__).parent.parent / "docs" / "configuration.md"


def put(root: Path, path: str, data: bytes = b"model") -> Path:
    """A file below the root, its directories made."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


def only(root: Path) -> Entry:
    """The one entry of the folder."""
    (entry,) = scan(root).entries.values()
    return entry


def reason(root: Path) -> str:
    """Why the one entry of the folder cannot be served."""
    problem = only(root).problem
    assert problem is not None
    assert "\n" not in problem[1]
    return problem[0]


def paths(entry: Entry) -> list[str]:
    """What would be staged."""
    return [stamp.path for stamp in entry.files]


class Day:
    """A folder under observation, and a clock that only the test moves."""

    def __init__(self, root: Path, settle_s: float = SETTLE_S) -> None:
        self.root = root
        self.folder = Folder(settle_s=settle_s)
        self.now_s = 100.0

    def look(self, after_s: float = 0.0) -> FolderChanges:
        """One scan, so much later."""
        self.now_s += after_s
        return self.folder.observe(scan(self.root), self.now_s)

    def rest(self) -> FolderChanges:
        """A scan, and one more when everything has come to rest."""
        self.look()
        return self.look(SETTLE_S)


# ---- what is found


def test_a_single_file_with_settings(tmp_path: Path) -> None:
    """NAME.onnx is a model, NAME.toml beside it its settings, which are no part of the content."""
    put(tmp_path, "digits.v2.onnx")
    put(tmp_path, "digits.v2.toml", b"threads = 2\n")
    entry = only(tmp_path)
    assert (entry.key, entry.format, entry.model_file, entry.base) == (
        ("digits.v2", None),
        "onnx",
        "digits.v2.onnx",
        "",
    )
    assert paths(entry) == ["digits.v2.onnx"]
    assert entry.settings.threads == 2
    assert entry.problem is None


def test_openvino_ir_needs_both_files(tmp_path: Path) -> None:
    """An .xml alone is not complete; with its .bin, which may be empty, it is a model."""
    put(tmp_path, "net.xml")
    assert reason(tmp_path) == "INCOMPLETE"
    put(tmp_path, "net.bin", b"")
    entry = only(tmp_path)
    assert entry.problem is None
    assert (entry.format, paths(entry)) == ("openvino_ir", ["net.xml", "net.bin"])


def test_a_bundle_is_staged_with_everything_in_it(tmp_path: Path) -> None:
    """External data, golden samples and sums belong to a bundle; unfinished and hidden files do not."""
    for path in (
        "model.onnx",
        "weights.bin",
        "golden/0.npz",
        "SHA256SUMS",
        "model.toml",
        ".hidden",
        "x.part",
    ):
        put(tmp_path, f"net/{path}", b"")
    put(tmp_path, "net/model.onnx")
    entry = only(tmp_path)
    assert entry.problem is None
    assert entry.base == "net"
    assert sorted(paths(entry)) == ["net/SHA256SUMS", "net/golden/0.npz", "net/model.onnx", "net/weights.bin"]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [(None, [10]), ('"latest:2"', [3, 10]), ('"all"', [1, 3, 10]), ("[1, 3, 7]", [1, 3])],
)
def test_version_directories_follow_the_policy(tmp_path: Path, policy: str | None, wanted: list[int]) -> None:
    """Versions are numbers, not texts, and NAME/model.toml says which are served."""
    for version in (1, 3, 10):
        put(tmp_path, f"net/{version}/model.onnx")
    if policy is not None:
        put(tmp_path, "net/model.toml", f"versions = {policy}\n".encode())
    entries = scan(tmp_path).entries
    assert sorted(key[1] or 0 for key in entries) == wanted
    assert all(entry.problem is None and entry.base == f"net/{entry.version}" for entry in entries.values())


def test_a_kubernetes_volume_is_followed(tmp_path: Path) -> None:
    """Links through ..data are models, and a swap of ..data is a change."""
    put(tmp_path, "..2026_a/net.onnx", b"old")
    put(tmp_path, "..2026_b/net.onnx", b"newer")
    os.symlink("..2026_a", tmp_path / "..data")
    os.symlink("..data/net.onnx", tmp_path / "net.onnx")
    day = Day(tmp_path)
    assert [entry.name for entry in day.rest().changed] == ["net"]
    os.symlink("..2026_b", tmp_path / "..data_tmp")
    os.rename(tmp_path / "..data_tmp", tmp_path / "..data")
    assert [entry.files[0].size_bytes for entry in day.rest().changed] == [5]


def test_unfinished_names_are_never_looked_at(tmp_path: Path) -> None:
    """Hidden names, names of unfinished copies, and files that are no models make no entry."""
    for name in (".net.onnx", "README.md", "net.toml", "net.bin"):
        put(tmp_path, name)
    for suffix in IGNORED_SUFFIXES:
        put(tmp_path, f"net.onnx{suffix}")
    (tmp_path / "lost+found").mkdir()
    assert scan(tmp_path).entries == {}


def test_the_documentation_names_every_ignored_suffix() -> None:
    """docs/configuration.md says what is never looked at."""
    assert all(f"`{suffix}`" in DOCUMENT.read_text() for suffix in IGNORED_SUFFIXES)


# ---- what cannot be served


def test_things_that_are_not_files_are_refused_without_opening_them(tmp_path: Path) -> None:
    """A directory, a pipe and a device under a model's name each have their reason, and none blocks."""
    (tmp_path / "a.onnx").mkdir()
    os.mkfifo(tmp_path / "b.onnx")
    put(tmp_path, "c/model.onnx")
    os.mkfifo(tmp_path / "c" / "pipe")
    os.mkfifo(tmp_path / "d.toml")
    put(tmp_path, "d.onnx")
    os.symlink("/dev/zero", tmp_path / "e.onnx")
    problems = {key[0]: entry.problem for key, entry in scan(tmp_path).entries.items()}
    assert {name: problem[0] for name, problem in problems.items() if problem} == {
        "a": "NOT_A_MODEL",
        "b": "UNSAFE_FILE",
        "c": "UNSAFE_FILE",
        "d": "SETTINGS_INVALID",
        "e": "UNSAFE_FILE",
    }
    for name in ("a.onnx", "b.onnx", "e.onnx"):
        with pytest.raises(UnsafeFileError):
            open_regular(str(tmp_path / name), os.path.realpath(tmp_path))


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    """Neither a file, nor a directory, nor settings may lead out of the folder."""
    root = tmp_path / "models"
    put(tmp_path, "models-private/model.onnx")
    root.mkdir()
    os.symlink("../models-private/model.onnx", root / "a.onnx")
    os.symlink("../models-private", root / "b")
    put(root, "c/model.onnx")
    os.symlink("../../models-private", root / "c" / "more")
    assert {entry.problem and entry.problem[0] for entry in scan(root).entries.values()} == {"UNSAFE_FILE"}
    with pytest.raises(UnsafeFileError, match="leads out"):
        open_regular(str(root / "a.onnx"), os.path.realpath(root))


@pytest.mark.parametrize("name", ["a b", "a\nb", "ä", "x" * 200, "-" * 129, "a\udcff", "$(reboot)", "a;b"])
def test_strange_names_are_refused_and_shown_on_one_line(tmp_path: Path, name: str) -> None:
    """A name that could hurt a log, a table or a shell is refused, whether file or directory."""
    put(tmp_path, f"{name}.onnx")
    assert reason(tmp_path) == "NAME_INVALID"
    (tmp_path / f"{name}.onnx").unlink()
    put(tmp_path, f"{name}/model.onnx")
    assert reason(tmp_path) == "NAME_INVALID"
    assert only(tmp_path).name.isascii()
    assert len(only(tmp_path).name) <= 128


def test_broken_content_has_its_reason(tmp_path: Path) -> None:
    """An empty file, a broken link, a bundle without a model, two models in one bundle, a foreign format."""
    put(tmp_path, "empty.onnx", b"")
    os.symlink("nowhere", tmp_path / "broken.onnx")
    os.symlink("loop.onnx", tmp_path / "loop.onnx")
    put(tmp_path, "nothing/readme.txt")
    put(tmp_path, "both/model.onnx")
    put(tmp_path, "both/model.xml")
    put(tmp_path, "kinds/model.onnx")
    put(tmp_path, "kinds/3/model.onnx")
    put(tmp_path, "torch.pt")
    put(tmp_path, "none/1/model.onnx")
    put(tmp_path, "none/model.toml", b"versions = [2]\n")
    problems = {key[0]: entry.problem and entry.problem[0] for key, entry in scan(tmp_path).entries.items()}
    assert problems == {
        "empty": "EMPTY_FILE",
        "broken": "UNREADABLE",
        "loop": "UNREADABLE",
        "nothing": "NOT_A_MODEL",
        "both": "NAME_CLASH",
        "kinds": "NAME_CLASH",
        "torch.pt": "NOT_A_MODEL",
        "none": "NOT_A_MODEL",
    }


def test_wrong_settings_name_file_line_and_key(tmp_path: Path) -> None:
    """A model whose TOML is wrong is refused in words; too large and not UTF-8 are wrong too."""
    put(tmp_path, "net.onnx")
    put(tmp_path, "net.toml", b"\nthread = 2\n")
    assert only(tmp_path).problem == (
        "SETTINGS_INVALID",
        "net.toml, line 2: unknown key `thread`. Did you mean `threads`?",
    )
    put(tmp_path, "net.toml", b"# \xff\n")
    assert reason(tmp_path) == "SETTINGS_INVALID"
    put(tmp_path, "net.toml", b"#" * 300_000)
    assert reason(tmp_path) == "SETTINGS_INVALID"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become a user without rights")
def test_what_may_not_be_read_is_unreadable(tmp_path: Path) -> None:
    """Without read permission a file, a bundle and the root itself each say so."""
    root = tmp_path / "models"
    put(root, "file.onnx").chmod(0)
    put(root, "closed/model.onnx")
    (root / "closed").chmod(0)
    for directory in (tmp_path, *list(tmp_path.parents)[:2]):
        directory.chmod(0o755)
    program = (
        "import os, sys, edged.repository as r\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "found = r.scan(sys.argv[1])\n"
        "print(sorted((k[0], e.problem and e.problem[0]) for k, e in found.entries.items()), found.fault)\n"
    )
    command = [sys.executable, "-c", program, str(root)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout == "[('closed', 'UNREADABLE'), ('file', 'UNREADABLE')] None\n"
    root.chmod(0)
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert "cannot be read: Permission denied" in done.stdout


def test_a_root_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    """A missing root, a file in its place, and a root with far too much in it are faults, not folders."""
    assert "No such file" in (scan(tmp_path / "none").fault or "")
    assert "Not a directory" in (scan(put(tmp_path, "file")).fault or "")
    crowd = tmp_path / "crowd"
    crowd.mkdir()
    for number in range(4097):
        os.close(os.open(crowd / str(number), os.O_CREAT | os.O_WRONLY))
    assert "4097 entries" in (scan(crowd).fault or "")


# ---- what changed, and what rests


def test_a_slow_copy_is_reported_once_it_rests(tmp_path: Path) -> None:
    """While a file grows nothing is said but when to look again; afterwards it is reported once."""
    day = Day(tmp_path)
    for step in range(5):
        put(tmp_path, "net.onnx", b"x" * (step + 1))
        changes = day.look(0.6)
        assert changes.changed == ()
        assert changes.recheck_after_s == pytest.approx(SETTLE_S)
    assert day.look(0.6).recheck_after_s == pytest.approx(0.4)
    assert [entry.name for entry in day.look(0.5).changed] == ["net"]
    assert day.look(5) == FolderChanges()


def test_thirty_models_at_once(tmp_path: Path) -> None:
    """A folder of thirty is one observation of thirty."""
    for number in range(30):
        put(tmp_path, f"net{number}.onnx")
    assert len(Day(tmp_path).rest().changed) == 30


def test_an_older_file_put_back_is_a_change(tmp_path: Path) -> None:
    """The times of a file may go backwards; whatever differs is a change."""
    old = put(tmp_path, "old", b"aaaaa")
    os.utime(old, (1, 1))
    put(tmp_path, "net.onnx", b"bbbbb")
    day = Day(tmp_path)
    day.rest()
    os.rename(old, tmp_path / "net.onnx")
    assert [entry.files[0].mtime_ns for entry in day.rest().changed] == [1_000_000_000]


def test_a_change_of_settings_alone_is_told_apart(tmp_path: Path) -> None:
    """New settings are reported as such; new settings that are wrong are a change with a problem."""
    put(tmp_path, "net.onnx")
    day = Day(tmp_path)
    day.rest()
    put(tmp_path, "net.toml", b"threads = 3\n")
    changes = day.rest()
    assert (changes.changed, [entry.settings.threads for entry in changes.settings_changed]) == ((), [3])
    put(tmp_path, "net.toml", b"threads = 'many'\n")
    changes = day.rest()
    assert [entry.problem and entry.problem[0] for entry in changes.changed] == ["SETTINGS_INVALID"]
    (tmp_path / "net.toml").unlink()
    assert [entry.problem for entry in day.rest().changed] == [None]


def test_a_removal_rests_too_so_that_a_replacement_is_none(tmp_path: Path) -> None:
    """rm and cp within the settle time is a change; rm alone is a removal."""
    put(tmp_path, "net.onnx", b"old")
    day = Day(tmp_path)
    day.rest()
    (tmp_path / "net.onnx").unlink()
    assert day.look() == FolderChanges(recheck_after_s=SETTLE_S)
    put(tmp_path, "net.onnx", b"newer")
    changes = day.rest()
    assert ([entry.name for entry in changes.changed], changes.removed) == (["net"], ())
    (tmp_path / "net.onnx").unlink()
    assert day.rest() == FolderChanges(removed=(("net", None),))


def test_a_version_that_another_supersedes_is_not_removed(tmp_path: Path) -> None:
    """The old version stays until the new one has come to rest, and is then superseded, not removed."""
    put(tmp_path, "net/1/model.onnx")
    day = Day(tmp_path)
    day.rest()
    put(tmp_path, "net/2/model.onnx", b"")
    assert day.look() == FolderChanges(recheck_after_s=SETTLE_S)
    put(tmp_path, "net/2/model.onnx", b"slow")
    assert day.look(0.9).superseded == ()
    first, second = day.look(SETTLE_S), day.look(SETTLE_S)
    assert [entry.key for entry in first.changed] == [("net", 2)]
    assert (first.superseded or second.superseded, first.removed, second.removed) == ((("net", 1),), (), ())


def test_one_of_all_versions_deleted_is_removed(tmp_path: Path) -> None:
    """Where nothing takes its place, a deleted version is a removal."""
    put(tmp_path, "net/model.toml", b'versions = "all"\n')
    for version in (1, 2):
        put(tmp_path, f"net/{version}/model.onnx")
    day = Day(tmp_path)
    day.rest()
    (tmp_path / "net/1/model.onnx").unlink()
    (tmp_path / "net/1").rmdir()
    assert day.rest().removed == (("net", 1),)


def test_broken_settings_remove_no_version(tmp_path: Path) -> None:
    """With settings that cannot be read nobody knows which versions are wanted, so all stay."""
    put(tmp_path, "net/model.toml", b'versions = "all"\n')
    for version in (1, 2):
        put(tmp_path, f"net/{version}/model.onnx")
    day = Day(tmp_path)
    day.rest()
    put(tmp_path, "net/model.toml", b'versions = "al')
    changes = day.rest()
    assert (changes.removed, changes.superseded) == ((), ())
    assert [entry.key for entry in changes.changed] == [("net", 2)]


def test_who_had_a_name_first_keeps_it(tmp_path: Path) -> None:
    """A second claim on a name is refused once, and takes over when the first goes."""
    put(tmp_path, "net.onnx")
    day = Day(tmp_path)
    day.rest()
    put(tmp_path, "net/7/model.onnx")
    changes = day.look()
    assert [entry.problem and entry.problem[0] for entry in changes.refused] == ["NAME_CLASH"]
    assert day.rest() == FolderChanges()
    (tmp_path / "net.onnx").unlink()
    first, second = day.rest(), day.look(SETTLE_S)
    assert [entry.key for entry in first.changed] == [("net", 7)]
    assert first.superseded + second.superseded == (("net", None),)


def test_a_claim_that_cannot_be_served_never_wins(tmp_path: Path) -> None:
    """A directory named net.onnx does not keep the bundle net from being served."""
    (tmp_path / "net.onnx").mkdir()
    put(tmp_path, "net/model.onnx")
    changes = Day(tmp_path).rest()
    assert [entry.problem for entry in changes.changed] == [None]


def test_forget_has_an_entry_reported_again(tmp_path: Path) -> None:
    """After a failed stage the same entry comes again, once it has rested once more."""
    put(tmp_path, "net.onnx")
    day = Day(tmp_path)
    day.rest()
    day.folder.forget(("net", None))
    assert day.look().changed == ()
    assert [entry.name for entry in day.look(SETTLE_S).changed] == ["net"]


def test_old_files_need_not_rest_at_the_start(tmp_path: Path) -> None:
    """With the wall clock, files last touched long ago are taken at once, and fresh ones are not."""
    put(tmp_path, "net.onnx")
    snapshot = scan(tmp_path)
    touched_s = snapshot.entries["net", None].files[0].ctime_ns / 1e9
    assert Folder(settle_s=1).observe(snapshot, 0, wall_s=touched_s + 0.5).changed == ()
    assert len(Folder(settle_s=1).observe(snapshot, 0, wall_s=touched_s + 1.5).changed) == 1
    assert Folder(settle_s=1).observe(snapshot, 0, wall_s=touched_s - 1e8).changed == ()


# ---- a folder that goes away


def test_a_vanished_root_removes_nothing(tmp_path: Path) -> None:
    """While the root is gone there is a fault; when it comes back as it was, nothing has happened."""
    root = tmp_path / "models"
    put(root, "net.onnx")
    day = Day(root)
    day.rest()
    os.rename(root, tmp_path / "away")
    for _ in range(3):
        changes = day.look(10)
        assert "cannot be read" in (changes.fault or "")
        assert replace(changes, fault=None) == FolderChanges()
    os.rename(tmp_path / "away", root)
    assert day.look(10) == FolderChanges()


def test_an_empty_mount_point_is_a_fault_until_it_holds_models(tmp_path: Path) -> None:
    """An empty root in the place of another is not mounted; one with models in it is the new truth."""
    root = tmp_path / "models"
    put(root, "net.onnx")
    put(root, "gone.onnx")
    day = Day(root)
    day.rest()
    os.rename(root, tmp_path / "away")
    root.mkdir()
    assert "is it mounted?" in (day.rest().fault or "")
    put(root, "net.onnx", b"other")
    changes = day.rest()
    assert changes.fault is None
    assert [entry.name for entry in changes.changed] == ["net"]
    assert changes.removed == (("gone", None),)


def test_another_file_system_is_noticed_by_its_number() -> None:
    """The device number tells an unmounted mount point even when the inode is the same."""
    entry = Entry("net", None, "onnx", "net.onnx", "")
    folder = Folder(settle_s=0)
    folder.observe(Snapshot("/m", None, (7, 2), {entry.key: entry}), 0)
    assert folder.observe(Snapshot("/m", None, (8, 2)), 1).fault is not None
    assert folder.observe(Snapshot("/m", None, (7, 2)), 2).removed == (("net", None),)


def test_models_of_an_earlier_life_are_expected(tmp_path: Path) -> None:
    """An empty folder at the start is a fault while models are expected; a healthy one shows deletions."""
    day = Day(tmp_path)
    day.folder.expect([("net", None), ("gone", None)])
    assert "is it mounted?" in (day.rest().fault or "")
    put(tmp_path, "net.onnx")
    changes = day.rest()
    assert ([entry.name for entry in changes.changed], changes.removed) == (["net"], (("gone", None),))
