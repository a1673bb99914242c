import errno
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseq.training import checkpoints
from jaxseq.training.errors import UserError


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def tree(value: float = 0.0) -> tuple:
    """Arrays of several dtypes and ranks in the containers that training states have."""
    pair = Pair(jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7 + value, jnp.ones(3, jnp.bfloat16))
    return (pair, (), {"count": jnp.int32(4), "flags": jnp.array([True, False])})


def assert_same(got: tuple, want: tuple) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def find(folder: pathlib.Path) -> tuple[int | None, list[str]]:
    """The step of the newest whole checkpoint, and what was reported of others."""
    messages: list[str] = []
    found = checkpoints.newest(folder, messages.append)
    return found and found.step, messages


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: pathlib.Path):
    checkpoints.save(tmp_path, 12, tree(), {"seconds": 1.5})
    found = checkpoints.newest(tmp_path)
    assert found is not None and (found.step, found.extra) == (12, {"seconds": 1.5})
    assert_same(checkpoints.restore(found, jax.eval_shape(tree)), tree())


def test_only_the_newest_are_kept(tmp_path: pathlib.Path):
    for step in (1, 20, 300):
        checkpoints.save(tmp_path, step, tree(), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["00000020", "00000300"]
    checkpoints.save(tmp_path, 300, tree(5.0), keep=2)
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert_same(checkpoints.restore(found, tree()), tree(5.0))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.ones((3, 2))}, r"it holds float32 of shape \(2, 3\) where a needs float32 of shape \(3, 2\)"),
        ({"a": jnp.ones((2, 3), jnp.bfloat16)}, r"it holds float32 of .* where a needs bfloat16 of shape \(2, 3\)"),
        ({"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(1)}}, r"it holds nothing where b.c needs float32 of shape \(1,\)"),
        ({}, r"it holds float32 of shape \(2, 3\) where a needs nothing"),
        ((jnp.ones((2, 3)),), r"it holds nothing where 0 needs float32 of shape \(2, 3\)"),
    ],
)
def test_a_tree_of_another_kind_is_refused(tmp_path: pathlib.Path, like: object, message: str):
    checkpoints.save(tmp_path, 1, {"a": jnp.ones((2, 3))})
    found = checkpoints.newest(tmp_path)
    assert found is not None
    with pytest.raises(ValueError, match=f"^{tmp_path}/00000001 is of another model: {message}$"):
        checkpoints.restore(found, like)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        checkpoints.save(folder, step, tree())
    return folder


def test_every_file_that_is_damaged_is_found_out(two: pathlib.Path, tmp_path: pathlib.Path):
    names = [path.relative_to(two / "00000002") for path in (two / "00000002").rglob("*") if path.is_file()]
    assert len(names) >= 5
    for name in names:
        for number, damage in enumerate(("flip", "cut", "remove")):
            folder = tmp_path / f"{str(name).replace('/', '-')}-{number}"
            shutil.copytree(two, folder)
            path = folder / "00000002" / name
            content = path.read_bytes()
            if damage == "flip":
                path.write_bytes(bytes([content[0] ^ 1]) + content[1:] if content else b"x")
            elif damage == "cut":
                path.write_bytes(content[:-1] if content else b"x")
            else:
                path.unlink()
            step, messages = find(folder)
            assert step == 1, (name, damage)
            assert len(messages) == 1 and "the checkpoint of step 2 is damaged" in messages[0]
            assert "using the one before it" in messages[0]


def test_half_written_ones_do_not_count_and_are_cleared_away(two: pathlib.Path, tmp_path: pathlib.Path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    shutil.copytree(folder / "00000002", folder / "00000003.partial")
    (folder / "00000004").mkdir()
    step, messages = find(folder)
    assert step == 2 and len(messages) == 1 and "step 4" in messages[0]
    checkpoints.save(folder, 4, tree())
    assert sorted(os.listdir(folder)) == ["00000001", "00000002", "00000004"]


def test_without_checkpoints_there_is_none(tmp_path: pathlib.Path):
    assert find(tmp_path / "nowhere") == find(tmp_path) == (None, [])


def test_damaged_ones_alone_are_an_error(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    for step in (7, 9):
        (tmp_path / f"{step:08d}").mkdir()
    with pytest.raises(
        UserError, match=r"^all checkpoints of .* are damaged \(2 in .*\): nothing was changed, start a"
    ):
        checkpoints.newest(tmp_path)
    assert capsys.readouterr().out == ""


def test_saving_never_removes_what_it_has_just_written(tmp_path: pathlib.Path):
    for step in (1, 3):
        checkpoints.save(tmp_path, step, tree(), keep=2)
    (tmp_path / "00000003" / "manifest.json").unlink()
    checkpoints.save(tmp_path, 2, tree(2.0), keep=1)
    assert sorted(os.listdir(tmp_path)) == ["00000002", "00000003"]
    assert find(tmp_path)[0] == 2
    checkpoints.remove_after(tmp_path, 2)
    assert os.listdir(tmp_path) == ["00000002"]


def test_folders_that_no_checkpoint_is_named_like_are_left_alone(two: pathlib.Path, tmp_path: pathlib.Path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    (folder / "9").mkdir()
    assert find(folder) == (2, [])
    checkpoints.save(folder, 3, tree(), keep=1)
    assert sorted(os.listdir(folder)) == ["00000003", "9"]


@pytest.mark.parametrize("manifest", ["[]", "null", "1", '"extra.json"', "{}"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_manifest_of_another_kind_is_damage(two: pathlib.Path, tmp_path: pathlib.Path, manifest: str, empty: bool):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    if empty:
        shutil.rmtree(folder / "00000002")
        (folder / "00000002").mkdir()
    (folder / "00000002" / "manifest.json").write_text(manifest)
    step, messages = find(folder)
    assert step == 1 and "step 2 is damaged (manifest.json " in messages[0]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_what_was_there(two: pathlib.Path, tmp_path: pathlib.Path, monkeypatch, call: str):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (pathlib.Path, "rename")), full)
        with pytest.raises(UserError, match=r"^no space left on the disk for the checkpoint of step 3 in .*$"):
            checkpoints.save(folder, 3, tree())
    assert sorted(os.listdir(folder)) == ["00000001", "00000002"] and find(folder) == (2, [])


def test_other_failures_are_not_called_a_full_disk(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        checkpoints.save(tmp_path / "file", 1, tree())


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_what_was_there(small_disk: pathlib.Path, capfd):
    checkpoints.save(small_disk, 1, tree())
    noise = {"noise": np.random.default_rng(0).random(100_000)}
    with pytest.raises(UserError, match="no space left on the disk for the checkpoint of step 2"):
        checkpoints.save(small_disk, 2, noise)
    assert os.listdir(small_disk) == ["00000001"] and find(small_disk) == (1, [])
    with pytest.raises(UserError, match="no space left on the disk for .*file"):
        checkpoints.write_whole(small_disk / "file", bytes(1_000_000))
    assert os.listdir(small_disk) == ["00000001"]
    assert capfd.readouterr().err == ""  # the one line is the error's
