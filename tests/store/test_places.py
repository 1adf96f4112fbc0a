"""Places: local folders and URIs are listed, read and refused alike; runs are found in both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from synthetic import write_run

from diagnostics.errors import NotARunError
from diagnostics.report import assess
from diagnostics.store.format import TABLES
from diagnostics.store.place import Entry, LocalPlace, Place, RemotePlace, place
from diagnostics.store.read import open_run
from diagnostics.store.reading.find import find_runs


def elsewhere(folder: Path) -> RemotePlace:
    """A folder as readers meet a store behind a URI."""
    return RemotePlace("s3://bucket/runs", "", SubTreeFileSystem(str(folder), LocalFileSystem()))


@pytest.fixture(params=["local", "elsewhere"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return LocalPlace(tmp_path) if request.param == "local" else elsewhere(tmp_path)


def test_a_place_lists_and_reads(root: Place, tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "file").write_bytes(b"content")
    (tmp_path / "folder" / "deep" / "er").write_bytes(b"")
    folder = root / "folder"
    assert folder.name == "folder"
    assert str(folder) == f"{root}/folder"
    assert folder.is_dir()
    assert not (folder / "file").is_dir()
    assert not (root / "nowhere").is_dir()
    status = (tmp_path / "folder" / "file").stat()
    deep, file = folder.entries()
    assert (deep.name, deep.is_dir, deep.size) == ("deep", True, 0)
    assert file == Entry("file", is_dir=False, size=7, mtime_ns=status.st_mtime_ns)
    assert [entry.name for entry in folder.entries(recursive=True)] == ["deep", "deep/er", "file"]
    assert (root / "nowhere").entries() == []
    assert (folder / "file").read_bytes() == b"content"
    assert (folder / "file").read_bytes(3) == b"tent"
    assert (folder / "file").read_bytes(70) == b""
    with pytest.raises(FileNotFoundError):
        (folder / "other").read_bytes()


def test_a_run_is_read_and_judged_alike_in_both(root: Place, tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, "mine", steps=60, collapse=True))
    same = open_run(root / "mine")
    assert same.name == "mine"
    for table in TABLES:
        assert same.table(table).equals(run.table(table))
    columns = ["entropy", "step"]
    assert same.attention(columns, layer="blocks.1.attn", head=1).equals(
        run.attention(columns, layer="blocks.1.attn", head=1)
    )
    assert assess(same).to_dict() == assess(run).to_dict()
    assert same.coarse("steps", 16).equals(run.coarse("steps", 16))
    assert same.follow("events").read().rows.equals(run.table("events"))


def test_runs_are_found_alike_in_both(root: Place, tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        write_run(tmp_path, name, steps=0)
    write_run(tmp_path / "deep" / "er", "c", steps=0)
    write_run(tmp_path / "a", "inside", steps=0)
    assert [str(found) for found in find_runs(root)] == [f"{root}/{name}" for name in ("a", "b", "deep/er/c")]
    assert [str(found) for found in find_runs(root / "a")] == [f"{root}/a"]
    with pytest.raises(NotARunError, match="is not a directory; give a run directory"):
        find_runs(root / "nowhere")
    with pytest.raises(NotARunError, match="is not a directory; give the directory that a Recorder wrote to"):
        open_run(root / "nowhere")
    with pytest.raises(NotARunError, match=r"holds no run\.json, so it is no run"):
        open_run(root / "deep")


def test_runs_below_a_path_are_paths(tmp_path: Path) -> None:
    write_run(tmp_path, "a", steps=0)
    assert find_runs(tmp_path) == [tmp_path / "a"]
    assert find_runs(str(tmp_path)) == [tmp_path / "a"]


def test_what_is_joined_to_a_uri_stands_before_its_options() -> None:
    inside = RemotePlace("s3://bucket/a?region=x", "bucket/a", None) / "steps" / Path("part.parquet")
    assert str(inside) == "s3://bucket/a/steps/part.parquet?region=x"
    assert (inside.path, inside.name) == ("bucket/a/steps/part.parquet", "part.parquet")


def test_paths_and_file_uris_are_local(tmp_path: Path) -> None:
    spaced = tmp_path / "a b"
    for text in (str(spaced), spaced.as_uri(), f"file://localhost{spaced.as_uri()[7:]}", spaced):
        assert place(text).local == spaced
    assert place("C://runs").local is not None  # a drive
    assert place(place(tmp_path)) == LocalPlace(tmp_path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "ftp://host/runs",
            "there is no store 'ftp'; give a local path or a URI that begins with one of s3://",
        ),
        ("s3://", "names no bucket; write s3://BUCKET/PATH"),
        ("s3:///runs", "names no bucket; write s3://BUCKET/PATH"),
        ("file://host/runs", "names a file of another machine; write file:///PATH"),
        ("abfs://container/runs", "write abfs://CONTAINER@ACCOUNT"),
    ],
)
def test_a_uri_that_leads_nowhere_says_what_to_do(uri: str, message: str) -> None:
    for ask in (open_run, find_runs):
        with pytest.raises(NotARunError) as caught:
            ask(uri)
        assert message in str(caught.value)


class Refusing:
    """A store that lets nobody in."""

    def get_file_info(self, _: object) -> object:
        raise OSError("When listing objects: AWS Error ACCESS_DENIED")

    open_input_file = get_file_info


def test_a_store_that_refuses_says_which_variables_to_set_and_no_secret() -> None:
    at = RemotePlace("s3://key:secret@bucket/x", "bucket/x", Refusing())
    for ask in (open_run, find_runs, RemotePlace.entries, RemotePlace.is_dir):
        with pytest.raises(NotARunError, match=r"ACCESS_DENIED.*set AWS_ACCESS_KEY_ID, AWS_SECRET") as caught:
            ask(at)
        assert "secret" not in str(caught.value)
        assert isinstance(caught.value, OSError)
    assert "secret" not in repr(at)


def test_a_local_path_imports_no_client_of_object_stores(tmp_path: Path) -> None:
    program = """
import sys
from diagnostics.store.reading.find import find_runs
from diagnostics.store.place import place
found = find_runs(sys.argv[1])
assert place(found[0]).entries() and place(found[0] / "run.json").read_bytes()
print(len(found), "pyarrow.fs" in sys.modules)
"""
    write_run(tmp_path, "a", steps=10)
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert (ended.stdout, ended.stderr) == ("1 False\n", "")


def test_finding_runs_looks_into_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write_run(tmp_path, f"run{number:02d}", steps=10)
    scanned = 0
    scandir = os.scandir

    def counting(path: str) -> object:
        nonlocal scanned
        scanned += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    assert len(find_runs(tmp_path)) == 20
    assert scanned == 21
