"""The folder and the volume that pages go to: whose it is, and what is warned of."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from ebbtide.offload.disk import spill_dir
from ebbtide.offload.disk.disk import (
    ScratchFile,
    Way,
    volume_warnings,
)
from ebbtide.offload.disk.spill_dir import Mount, default_spill_dir, format_bytes
from ebbtide.offload.errors import InputError

WAYS = pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions and processes")


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    if sys.platform != "linux":
        pytest.skip("the cache folder is moved by XDG_CACHE_HOME, which Linux reads")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_default_folder_is_the_users_own_and_not_tmp(cache_home):
    old = os.umask(0)
    try:
        file = ScratchFile()
    finally:
        os.umask(old)
    assert file.directory == cache_home / "ebbtide" / "spill"
    for folder in (file.directory, file.directory.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    file.close()


def test_a_lax_default_folder_is_closed_to_others(cache_home):
    (cache_home / "ebbtide" / "spill").mkdir(parents=True)
    os.chmod(cache_home / "ebbtide" / "spill", 0o777)
    assert stat.S_IMODE(default_spill_dir().stat().st_mode) == 0o700


def test_a_planted_default_folder_is_refused(cache_home, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (cache_home / "ebbtide").mkdir(parents=True)
    (cache_home / "ebbtide" / "spill").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="link"):
        default_spill_dir()


def test_another_users_default_folder_is_refused(cache_home, monkeypatch):
    default_spill_dir()
    monkeypatch.setattr(spill_dir.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match="another user"):
        default_spill_dir()


@WAYS
@pytest.mark.parametrize("what", ["missing", "a file"])
def test_a_folder_that_is_none_is_the_users_mistake(way, what, tmp_path):
    path = tmp_path / "x"
    if what == "a file":
        path.write_bytes(b"")
    with pytest.raises(InputError, match="--spill-dir"):
        ScratchFile(path, way)


@posix
@WAYS
def test_an_unwritable_folder_is_the_users_mistake(way):
    # Not in tmp_path, which another user cannot even reach; and root may write everywhere, so
    # for the moment of the call we are nobody.
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o555)
    me = os.geteuid()
    try:
        if me == 0:
            os.seteuid(65534)
        with pytest.raises(InputError, match="Permission denied") as caught:
            ScratchFile(folder, way)
        assert folder in str(caught.value) and caught.value.exit_code == 2
    finally:
        os.seteuid(me)
        os.rmdir(folder)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1 << 10, "1.0 KiB"), (1536 << 10, "1.5 MiB")],
)
def test_amounts_are_readable(amount, text):
    assert format_bytes(amount) == text


@pytest.mark.parametrize(
    ("mount", "word"),
    [
        (Mount("tmpfs", "/data", "tmpfs", "rw"), "memory"),
        (Mount("/dev/zram0", "/data", "ext4", "rw"), "memory"),
        (Mount("box:/x", "/data", "nfs4", "rw"), "network"),
        (Mount("//box/x", "/data", "cifs", "rw"), "network"),
        (Mount("box:", "/data", "fuse.sshfs", "rw"), "network"),
        (Mount("E:", "/data", "NTFS", "rw,removable"), "removable"),
        (Mount("/dev/sdb1", "/data", "ext4", "rw"), "removable"),
        (Mount("/dev/nvme0n1p2", "/data", "ext4", "rw"), None),
    ],
)
def test_poor_volumes_are_warned_of(mount, word, tmp_path):
    block = tmp_path / "devices" / "sdb"
    (block / "sdb1").mkdir(parents=True)
    (block / "removable").write_text("1\n")
    (tmp_path / "class/block").mkdir(parents=True)
    (tmp_path / "class/block/sdb1").symlink_to(block / "sdb1")
    mounts = [Mount("/dev/root", "/", "ext4", "rw"), mount]
    warnings = volume_warnings("/data/spill", mounts, str(tmp_path))
    assert len(warnings) == (word is not None)
    assert all(word in w and "/data/spill" in w and "--spill-dir" in w for w in warnings)
    # A folder next to it lies on the good volume.
    assert volume_warnings("/database", mounts, str(tmp_path)) == []


def test_a_real_tmpfs_is_seen():
    shm = Path("/dev/shm")
    if not os.path.ismount(shm):
        pytest.skip("no tmpfs at /dev/shm")
    assert "memory" in volume_warnings(shm)[0]
