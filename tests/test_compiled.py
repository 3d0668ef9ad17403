"""What is kept of a load is used only if it is whole and ours, and goes when there is too much of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edged.properties import parted
from edged.runtimes import onnxruntime
from edged.runtimes.base import LoadCancel, LoadFailed, LoadRequest, create_runtime
from edged.runtimes.compiled import BYTES_MAX, Kept, cache_folder, cpu_identity, key_of, prune
from tests import zoo

KEY = key_of({"model": 1})


def keep(kept: Kept, content: bytes = b"optimised", key: str = KEY) -> None:
    """Publishes an entry."""
    temporary = kept.begin(key, len(content))
    assert temporary is not None
    temporary.write_bytes(content)
    kept.publish(temporary, key, {"about": "it"})


def found(kept: Kept, key: str = KEY) -> bytes | None:
    """What would be loaded."""
    with kept.find(key) as entry:
        if entry is None:
            return None
        path, note = entry
        assert note == {"about": "it"}
        return Path(path).read_bytes()


def test_an_entry_comes_back(tmp_path: Path) -> None:
    """What was published is found, under its key only, and nothing else is left in the folder."""
    kept = Kept(tmp_path / "cache")
    assert found(kept) is None
    keep(kept)
    assert found(kept) == b"optimised"
    assert found(kept, key_of({"model": 2})) is None
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [KEY, f"{KEY}.json"]


def flip(path: Path) -> None:
    path.write_bytes(b"optimizeD")


def truncate(path: Path) -> None:
    path.write_bytes(b"optim")


def open_to_others(path: Path) -> None:
    path.chmod(0o666)


def open_folder(path: Path) -> None:
    path.parent.chmod(0o755)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def second_name(path: Path) -> None:
    os.link(path, path.with_name("second"))


def no_note(path: Path) -> None:
    path.with_name(f"{path.name}.json").unlink()


def note_of_another(path: Path) -> None:
    path.with_name(f"{path.name}.json").write_text('{"sha256": 5, "bytes": [], "note": {}}')


@pytest.mark.parametrize(
    "harm",
    [flip, truncate, open_to_others, open_folder, link, second_name, no_note, note_of_another],
    ids=lambda harm: harm.__name__,
)
def test_an_entry_that_is_not_as_it_was_made_is_not_used(
    harm: Callable[[Path], None], tmp_path: Path
) -> None:
    """Corrupted, or such that somebody else may have written it."""
    kept = Kept(tmp_path / "cache")
    keep(kept)
    harm(tmp_path / "cache" / KEY)
    assert found(kept) is None


def test_an_entry_replaces_a_bad_one(tmp_path: Path) -> None:
    """The next load keeps its result anew."""
    kept = Kept(tmp_path / "cache")
    keep(kept)
    flip(tmp_path / "cache" / KEY)
    keep(kept)
    assert found(kept) == b"optimised"


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    """Down to the bound, each with its note; unfinished files stay for as long as one may be at them."""
    kept = Kept(tmp_path / "cache")
    keys = [key_of({"model": n}) for n in range(3)]
    for age, key in enumerate(keys):
        keep(kept, b"x" * 100, key)
        os.utime(tmp_path / "cache" / key, (10 + age, 10 + age))
    fresh, stale = tmp_path / "cache" / ".fresh.1", tmp_path / "cache" / ".stale.1"
    fresh.touch()
    stale.touch()
    os.utime(stale, (0, 0))
    assert found(kept, keys[0]) is not None, "a use makes it the youngest"
    prune(tmp_path / "cache", bytes_max=250)
    left = {p.name for p in (tmp_path / "cache").iterdir()}
    assert left == {keys[0], f"{keys[0]}.json", keys[2], f"{keys[2]}.json", ".fresh.1"}


def test_a_folder_that_is_not_ours_alone_is_not_used(tmp_path: Path) -> None:
    """Nothing is written where others may write or look."""
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").touch()
    assert cache_folder(tmp_path, "open") is None
    assert cache_folder(tmp_path, "file") is None
    assert Kept(tmp_path / "open").begin(KEY, 1) is None
    assert cache_folder(tmp_path, "new") == tmp_path / "new"


def test_a_full_disk_keeps_nothing(tmp_path: Path) -> None:
    """An entry must leave room for what is needed more, and have room itself."""
    assert Kept(tmp_path / "cache").begin(KEY, 1 << 60) is None
    assert Kept(tmp_path / "cache").begin(KEY, BYTES_MAX + 1) is None


def test_the_processor_is_part_of_the_name() -> None:
    """Its name and features are known, and the same each time."""
    assert cpu_identity() == cpu_identity()
    assert "|" in cpu_identity()


@pytest.fixture
def small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are kept as well."""
    monkeypatch.setattr(onnxruntime, "KEEP_FROM_BYTES", 0)


def answer(path: Path, cache: Path, content: str = "c") -> tuple[np.ndarray, object]:
    """What a model answers that is loaded with a cache, and what it says of itself."""
    request = LoadRequest(path=str(path), cache_dir=str(cache), content=content)
    model = create_runtime("onnxruntime").load(request, LoadCancel())
    for thread in threading.enumerate():
        if thread.name == "keeper":
            thread.join(60)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    told = (model.inputs, model.outputs, model.metadata)
    return model.run({"x": x}, ["y"])[0], told


def test_a_second_load_takes_what_was_kept(small_too: None, tmp_path: Path) -> None:
    """It does not read the model again: other bytes in the same file answer as the first did, to the bit."""
    path = zoo.write(tmp_path / "a.onnx", zoo.mlp(seed=1))
    want, told = answer(path, tmp_path)
    status = path.stat()
    path.write_bytes(zoo.mlp(seed=2).SerializeToString())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    got, told_again = answer(path, tmp_path)
    np.testing.assert_array_equal(got, want)
    assert told_again == told
    fresh, _ = answer(path, tmp_path, content="another")
    assert not np.allclose(fresh, want)


@pytest.mark.parametrize("count", [350_000, 8 << 20])
def test_metadata_is_kept_whole_or_not_at_all(small_too: None, tmp_path: Path, count: int) -> None:
    """A note that is too long to be read again makes no entry: the next load asks the model itself."""
    said = {"character": "字" * count}
    model = zoo.mlp(seed=1)
    onnx.helper.set_model_props(model, said)
    path = zoo.write(tmp_path / "a.onnx", model)
    for _ in range(2):
        _, (_, _, metadata) = answer(path, tmp_path)
        assert parted(metadata)[1] == said
    entries = [p for p in (tmp_path / "onnxruntime").iterdir() if not p.suffix]
    assert len(entries) == (1 if count == 350_000 else 0)


def test_what_was_kept_of_a_rotten_copy_is_not_taken_for_the_copy_in_its_place(
    small_too: None, tmp_path: Path
) -> None:
    """A load does not know whether its file is rotten; the copy in its place has the same content's name."""
    path = zoo.write(tmp_path / "a.onnx", zoo.mlp(seed=1))
    rotten, _ = answer(path, tmp_path)
    zoo.write(path, zoo.mlp(seed=2))
    sound, _ = answer(path, tmp_path)
    want, _ = answer(zoo.write(tmp_path / "b.onnx", zoo.mlp(seed=2)), tmp_path / "elsewhere")
    np.testing.assert_array_equal(sound, want)
    assert not np.allclose(sound, rotten)


def test_a_damaged_entry_is_made_anew(small_too: None, tmp_path: Path) -> None:
    """The model itself is loaded, and the entry is good afterwards."""
    path = zoo.write(tmp_path / "a.onnx", zoo.mlp(seed=1))
    want, _ = answer(path, tmp_path)
    (entry,) = [p for p in (tmp_path / "onnxruntime").iterdir() if not p.suffix]
    raw = bytearray(entry.read_bytes())
    raw[len(raw) // 2] ^= 255
    entry.write_bytes(raw)
    got, _ = answer(path, tmp_path)
    np.testing.assert_array_equal(got, want)
    assert entry.read_bytes() != bytes(raw)


def test_a_model_that_does_not_load_leaves_nothing(small_too: None, tmp_path: Path) -> None:
    """A refusal stays what it is with a cache."""
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(LoadFailed):
        answer(path, tmp_path)
    assert not list((tmp_path / "onnxruntime").iterdir())


def test_small_models_are_not_kept(tmp_path: Path) -> None:
    """Where a load takes milliseconds there is nothing to save."""
    answer(zoo.write(tmp_path / "a.onnx", zoo.mlp()), tmp_path)
    assert not (tmp_path / "onnxruntime").exists()
