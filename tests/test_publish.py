"""Publishing into a real folder: all of it appears, or nothing has changed."""

from __future__ import annotations

import errno
import os
import pathlib
import resource
import stat
import threading

import pytest

from edged.cli import publish as module
from edged.cli.publish import PublishError, publish


@pytest.fixture
def models(tmp_path: pathlib.Path) -> pathlib.Path:
    """An empty models folder."""
    folder = tmp_path / "models"
    folder.mkdir(mode=0o755)
    return folder


def write(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """`path` with `content`, its directories made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tree(root: pathlib.Path) -> dict[str, bytes]:
    """Every file below `root`, hidden ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(params=["exchange", "rename"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that can exchange two names, and one that can not."""
    if request.param == "rename":

        def cannot(_source: pathlib.Path, target: pathlib.Path, _flags: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument", str(target))

        monkeypatch.setattr(module, "_renameat2", cannot)
    return str(request.param)


def test_a_file_is_published_whole(tmp_path: pathlib.Path, models: pathlib.Path, kernel: str) -> None:
    """New, then replaced, then the same again: each is told apart."""
    source = write(tmp_path / "m.onnx", b"one")
    first = publish(source, models)
    assert (first.name, first.replaced, first.unchanged) == ("m", False, False)
    write(source, b"two")
    second = publish(source, models)
    assert (second.replaced, second.unchanged) == (True, False)
    assert publish(source, models).unchanged
    assert tree(models) == {"m.onnx": b"two"}


def test_settings_and_weights_go_along(tmp_path: pathlib.Path, models: pathlib.Path, kernel: str) -> None:
    """An IR is two files and may have settings; a name given renames them all."""
    source = write(tmp_path / "net.xml", b"<net/>")
    write(tmp_path / "net.bin", b"weights")
    settings = write(tmp_path / "any.toml", b"threads = 1\n")
    published = publish(source, models, name="other", settings=settings)
    assert published.path == models / "other.xml"
    assert tree(models) == {"other.xml": b"<net/>", "other.bin": b"weights", "other.toml": b"threads = 1\n"}


def test_a_bundle_replaces_a_bundle_whole(tmp_path: pathlib.Path, models: pathlib.Path, kernel: str) -> None:
    """Nothing of the old one is left, and half-copied and hidden files do not come along."""
    write(models / "m" / "model.onnx", b"old")
    write(models / "m" / "gone.bin", b"old")
    source = tmp_path / "m"
    write(source / "1" / "model.onnx", b"new")
    write(source / "1" / "golden" / "0" / "x.npy", b"x")
    write(source / ".git" / "config", b"no")
    write(source / "weights.part", b"no")
    published = publish(source, models, settings=write(tmp_path / "s.toml", b"# s\n"))
    assert published.replaced
    assert tree(models) == {"m/1/model.onnx": b"new", "m/1/golden/0/x.npy": b"x", "m/model.toml": b"# s\n"}


def test_a_reader_always_finds_one_whole_model(tmp_path: pathlib.Path, models: pathlib.Path) -> None:
    """While a bundle is replaced again and again, its two files are always there and belong together."""
    sources = []
    for n in (b"a" * 4096, b"b" * 4096):
        source = tmp_path / n[:1].decode() / "m"
        write(source / "model.onnx", n)
        write(source / "data.bin", n)
        sources.append(source)
    publish(sources[0], models)
    if os.stat(models).st_dev and not _can_exchange(tmp_path):
        pytest.skip("this file system can not exchange names")
    stop = threading.Event()
    bad: list[str] = []

    def read() -> None:
        while not stop.is_set():
            try:
                fd = os.open(models / "m", os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                bad.append("absent")
                return
            try:
                with open(os.open("model.onnx", os.O_RDONLY, dir_fd=fd), "rb") as f:
                    one = f.read()
                with open(os.open("data.bin", os.O_RDONLY, dir_fd=fd), "rb") as f:
                    two = f.read()
                if one != two or len(one) != 4096:
                    bad.append("mixed")
            except FileNotFoundError:
                pass  # the old directory, opened before the swap, is being taken away
            finally:
                os.close(fd)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(30):
        publish(sources[turn % 2], models)
    stop.set()
    reader.join(30)
    assert not bad


def _can_exchange(directory: pathlib.Path) -> bool:
    a, b = write(directory / "xa", b""), write(directory / "xb", b"")
    try:
        module._renameat2(a, b, module._RENAME_EXCHANGE)
    except OSError:
        return False
    return True


def test_a_copy_that_fails_changes_nothing(tmp_path: pathlib.Path, models: pathlib.Path) -> None:
    """The second of two files does not fit: neither is there, and no hidden rest."""
    write(models / "net.xml", b"old")
    write(models / "net.bin", b"old")
    before = tree(models)
    source = write(tmp_path / "net.xml", b"x" * 100_000)
    write(tmp_path / "net.bin", b"b")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(PublishError, match="nothing was changed"):
            publish(source, models)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(models) == before


def test_a_rename_that_fails_is_undone(
    tmp_path: pathlib.Path, models: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """The settings were swapped in, the model could not be: the old settings are back."""
    write(models / "m.onnx", b"old")
    write(models / "m.toml", b"# old\n")
    before = tree(models)
    real = module._swap_in

    def fail_for_the_model(temp: pathlib.Path, target: pathlib.Path) -> bool:
        if target.suffix == ".onnx":
            raise OSError(errno.EIO, "Input/output error", str(target))
        return real(temp, target)

    monkeypatch.setattr(module, "_swap_in", fail_for_the_model)
    source = write(tmp_path / "m.onnx", b"new")
    with pytest.raises(PublishError, match="Input/output error"):
        publish(source, models, settings=write(tmp_path / "m.toml", b"# new\n"))
    assert tree(models) == before


def test_who_may_read_the_folder_may_read_the_model(tmp_path: pathlib.Path, models: pathlib.Path) -> None:
    """Whatever the umask is: the daemon is another user."""
    source = tmp_path / "m"
    write(source / "1" / "model.onnx", b"m")
    before = os.umask(0o077)
    try:
        publish(source, models)
    finally:
        os.umask(before)
    assert stat.S_IMODE((models / "m" / "1").stat().st_mode) == 0o755
    assert stat.S_IMODE((models / "m" / "1" / "model.onnx").stat().st_mode) == 0o644


def test_a_private_folder_stays_private(tmp_path: pathlib.Path, models: pathlib.Path) -> None:
    """No right is given that the folder does not give."""
    models.chmod(0o700)
    publish(write(tmp_path / "m.onnx", b"m"), models)
    assert stat.S_IMODE((models / "m.onnx").stat().st_mode) == 0o600


def test_a_link_in_the_folder_is_replaced_and_not_followed(
    tmp_path: pathlib.Path, models: pathlib.Path, kernel: str
) -> None:
    """What it named is somebody else's and stays."""
    kept = write(tmp_path / "kept.onnx", b"kept")
    (models / "m.onnx").symlink_to(kept)
    publish(write(tmp_path / "m.onnx", b"new"), models)
    assert not (models / "m.onnx").is_symlink()
    assert kept.read_bytes() == b"kept"


def test_leftovers_of_killed_puts_go_after_a_day(
    tmp_path: pathlib.Path, models: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else that is hidden does."""
    write(models / ".m.onnx.123.0a1b2c3d.part", b"half")
    write(models / ".mine.part", b"mine")
    publish(write(tmp_path / "m.onnx", b"m"), models)
    assert len(tree(models)) == 3
    monkeypatch.setattr(module, "LEFTOVER_AGE_S", -5)
    publish(write(tmp_path / "m.onnx", b"m"), models)
    assert set(tree(models)) == {".mine.part", "m.onnx"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../m", "can not name a model"),
        (".m", "can not name a model"),
        ("m\n", "can not name a model"),
        ("m" * 129, "can not name a model"),
        ("m.part", "can not name a model"),
        ("", "can not name a model"),
        ("taken", "already"),
    ],
)
def test_impossible_names_are_refused(
    tmp_path: pathlib.Path, models: pathlib.Path, name: str, words: str
) -> None:
    """With the rule, and with nothing written."""
    write(models / "taken" / "model.onnx", b"t")
    with pytest.raises(PublishError, match=words):
        publish(write(tmp_path / "m.onnx", b"m"), models, name=name)
    assert tree(models) == {"taken/model.onnx": b"t"}


def test_sources_that_are_no_model_are_refused(tmp_path: pathlib.Path, models: pathlib.Path) -> None:
    """Each in its own words, with nothing written."""
    (tmp_path / "hollow").mkdir()
    odd = tmp_path / "odd"
    odd.mkdir()
    os.mkfifo(odd / "pipe")
    for source, words in [
        (tmp_path / "none.onnx", "is not there"),
        (write(tmp_path / "m.pt", b"x"), "is no model"),
        (write(tmp_path / "e.onnx", b""), "is empty"),
        (write(tmp_path / "w.xml", b"x"), "needs its weights"),
        (tmp_path / "hollow", "is empty"),
        (odd, "neither a file nor a directory"),
    ]:
        with pytest.raises(PublishError, match=words):
            publish(source, models)
    with pytest.raises(PublishError, match="models folder"):
        publish(tmp_path / "e.onnx", tmp_path / "nowhere")
    assert not list(models.iterdir())
