import errno
import json
import os
import pathlib
import re

import pytest

import continuous_lm as clm
from continuous_lm.io import atomic_files
from continuous_lm.io.json_files import read_json, write_json


def tree(folder):
    """Return every path below `folder`, hidden ones too, with the text of each file."""
    return {
        str(p.relative_to(folder)): p.read_text() if p.is_file() else None
        for p in folder.rglob("*")
    }


def write_pair(folder, a="new a", b="new b"):
    with atomic_files.write_atomically(folder) as aside:
        (aside / "a").write_text(a)
        (aside / "b").write_text(b)


# --- written_aside ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results", "deep/er/results"])
def test_new_folder_appears_with_all_its_files_at_once(tmp_path, name):
    with atomic_files.write_atomically(tmp_path / name) as aside:
        (aside / "a").write_text("new a")
        assert not (tmp_path / name).exists()
        assert (
            aside.stat().st_dev == tmp_path.stat().st_dev
        )  # so that a rename can do it
    assert tree(tmp_path / name) == {"a": "new a"}
    assert [p.name for p in tmp_path.iterdir()] == [name.split("/")[0]]


def test_existing_folder_keeps_other_files_and_replaces_its_own(tmp_path):
    (tmp_path / "a").write_text("old a")
    (tmp_path / "other").write_text("other")
    old = (tmp_path / "a").stat().st_ino
    with atomic_files.write_atomically(tmp_path) as aside:
        (aside / "a").write_text("new a")
        assert (tmp_path / "a").read_text() == "old a"
    assert tree(tmp_path) == {"a": "new a", "other": "other"}
    assert (tmp_path / "a").stat().st_ino != old  # renamed over, never written into


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, clm.InputError])
def test_exceptions_leave_no_file(tmp_path, exists, error):
    folder = tmp_path / "results"
    if exists:
        folder.mkdir()
        (folder / "a").write_text("old a")
    before = tree(tmp_path)

    def fail():
        with atomic_files.write_atomically(folder) as aside:
            (aside / "a").write_text("half")
            raise error("on the way")

    with pytest.raises(error, match="on the way"):
        fail()
    assert tree(tmp_path) == before


def test_full_disks_are_reported_in_one_error(tmp_path):
    def fail():
        with atomic_files.write_atomically(tmp_path / "results") as aside:
            (aside / "a").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        clm.InputError, match=r"cannot write to .*results: No space left"
    ):
        fail()
    assert tree(tmp_path) == {}


def test_a_folder_in_the_place_of_a_file_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old a")
    (tmp_path / "b").mkdir()
    before = tree(tmp_path)
    with pytest.raises(clm.InputError, match="cannot write to"):
        write_pair(tmp_path)
    assert tree(tmp_path) == before


def test_replaced_files_are_removed(tmp_path):
    for name in ("part-1", "part-2", "my-part-1", "other"):
        (tmp_path / name).write_text("old")
    with atomic_files.write_atomically(
        tmp_path, stale_pattern=re.compile(r"part-\d|all")
    ) as aside:
        (aside / "part-1").write_text("new")
        assert (tmp_path / "part-2").exists()  # not sooner
    assert tree(tmp_path) == {"part-1": "new", "my-part-1": "old", "other": "old"}


def test_a_folder_among_files_to_remove_changes_nothing(tmp_path):
    (tmp_path / "part-1").write_text("old")
    (tmp_path / "part-2").mkdir()
    before = tree(tmp_path)

    def fail():
        with atomic_files.write_atomically(
            tmp_path, stale_pattern=re.compile(r"part-\d")
        ) as aside:
            (aside / "part-1").write_text("new")

    with pytest.raises(clm.InputError, match="part-2 is a folder there"):
        fail()
    assert tree(tmp_path) == before


def test_relative_folders_do_not_follow_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic_files.write_atomically("results") as aside:
        os.chdir("elsewhere")
        (aside / "a").write_text("new a")
    assert tree(tmp_path) == {"elsewhere": None, "results": None, "results/a": "new a"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        write_pair(tmp_path / "results")
        assert os.umask(mask) == mask  # reading it must not change it
    finally:
        os.umask(old)
    assert (tmp_path / "results").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "results" / "a").stat().st_mode & 0o777 == 0o666 & ~mask


# --- replaced_whole --------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_folders_are_replaced_completely(tmp_path, exists):
    folder = tmp_path / "deep" / "results"
    if exists:
        (folder / "old").mkdir(parents=True)
        (folder / "old" / "a").write_text("old a")
    with atomic_files.replace_atomically(folder) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "a").write_text("new a")
        assert (folder / "old" / "a").exists() == exists
    assert tree(folder) == {"sub": None, "sub/a": "new a"}
    assert os.listdir(tmp_path / "deep") == ["results"]


def test_one_of_two_simultaneous_replacements_wins(tmp_path):
    folder = tmp_path / "results"
    for _ in range(2):
        with atomic_files.replace_atomically(folder) as first:
            (first / "a").write_text("first")
            with atomic_files.replace_atomically(folder) as second:
                (second / "a").write_text("second")
        assert tree(tmp_path) == {"results": None, "results/a": "first"}


def test_a_concurrent_writer_between_the_two_renames(tmp_path, monkeypatch):
    folder, rename = tmp_path / "results", os.rename

    def slow(a, b):
        if pathlib.Path(b) == folder:  # the other's is there by now
            folder.mkdir()
            (folder / "a").write_text("other")
        rename(a, b)

    monkeypatch.setattr(os, "rename", slow)
    with atomic_files.replace_atomically(folder) as aside:
        (aside / "a").write_text("ours")
    assert tree(tmp_path) == {"results": None, "results/a": "other"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, clm.InputError])
def test_an_exception_replaces_nothing(tmp_path, error):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a").write_text("old a")
    before = tree(tmp_path)

    def fail():
        with atomic_files.replace_atomically(tmp_path / "results") as aside:
            (aside / "a").write_text("half")
            raise error("on the way")

    with pytest.raises(error, match="on the way"):
        fail()
    assert tree(tmp_path) == before


# --- Folders that cannot be written ----------------------------------------------------------


@pytest.fixture(
    params=["below a file", "a file", "/proc", "too long a name", "a broken link"]
)
def unwritable(request, tmp_path):
    (tmp_path / "file").write_text("mine")
    match request.param:
        case "below a file":
            return tmp_path / "file" / "results"
        case "a file":
            return tmp_path / "file"
        case "/proc":  # where not even root can
            if not pathlib.Path("/proc/self").exists():
                pytest.skip("there is no /proc here")
            return pathlib.Path("/proc/results")
        case "too long a name":
            return tmp_path / ("x" * 300)
        case "a broken link":
            (tmp_path / "link").symlink_to(tmp_path / "nowhere")
            return tmp_path / "link"


def test_unwritable_folders_are_refused_before_and_during_writing(tmp_path, unwritable):
    before = tree(tmp_path)
    with pytest.raises(clm.InputError) as refused:
        atomic_files.check_writable(unwritable)
    assert str(unwritable) in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(clm.InputError) as refused:
        write_pair(unwritable)
    assert str(unwritable) in str(refused.value)
    assert tree(tmp_path) == before


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write it all"
)
def test_folder_without_permission_is_refused(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    for folder in (closed, closed / "results"):
        with pytest.raises(clm.InputError, match="Permission denied"):
            atomic_files.check_writable(folder)


@pytest.mark.parametrize("name", [".", "new", "deep/er/new"])
def test_check_writable_leaves_no_trace(tmp_path, name):
    atomic_files.check_writable(tmp_path / name)
    assert tree(tmp_path) == {}


# --- JSON ------------------------------------------------------------------------------------


def test_json_round_trips(tmp_path):
    values = {"a": [1, 2.5, None, True], "b": {"ü": "ß"}}
    write_json(tmp_path / "x.json", values)
    assert read_json(tmp_path / "x.json") == values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_with_nan_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": value})
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ("[1]", "one JSON object, not a list"),
        ("null", "one JSON object, not a NoneType"),
    ],
)
def test_broken_json_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(clm.InputError, match=message) as refused:
        read_json(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < len(str(path)) + 200


def test_errors_distinguish_missing_and_unreadable_json(tmp_path):
    with pytest.raises(clm.InputError, match=r"x\.json is missing"):
        read_json(tmp_path / "x.json")
    with pytest.raises(clm.InputError, match=r"cannot be read: Is a directory"):
        read_json(tmp_path)


def test_json_is_written_as_utf8_for_people(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1], "b": 2})
    text = (tmp_path / "x.json").read_bytes().decode()
    assert json.loads(text) == {"a": [1], "b": 2}
    assert text.endswith("}\n")
    assert "\n  " in text


def test_private_files_get_the_permissions_of_the_umask(tmp_path):
    with atomic_files.write_atomically(tmp_path / "new") as aside:
        (aside / "weights").write_bytes(b"1")
        (aside / "weights").chmod(0o600)
    (tmp_path / "plain").touch()
    assert (tmp_path / "new" / "weights").stat().st_mode == (
        tmp_path / "plain"
    ).stat().st_mode
