"""The uploader against folders of this machine; tests/record/test_remote.py has it talk to a real server."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.fs
import pytest
from synthetic import manifest, write_run, write_table

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import MANIFEST, PartName
from diagnostics.store.parts.merge import Folder, merge
from diagnostics.store.read import open_run
from diagnostics.store.remote.folder import Remote, open_remote, shown_uri
from diagnostics.store.remote.mirror import Mirror
from diagnostics.store.remote.outbox import waiting
from diagnostics.store.remote.spool import spool_of
from diagnostics.store.remote.upload import Uploader


def remote_at(folder: Path, kind: type[Remote] = Remote) -> Remote:
    store = pyarrow.fs.SubTreeFileSystem(str(folder.parent), pyarrow.fs.LocalFileSystem())
    return kind(store, folder.name, f"far://{folder.name}")


def contained(job: Callable[[], None]) -> bool:
    job()
    return True


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def write_steps(run_dir: Path, first: int, number: int) -> None:
    """Ten rows of the table steps, as flush `number`."""
    write_table(
        run_dir, "steps", [{"step": step, "loss": 0.5 * step} for step in range(first, first + 10)], number
    )


def merge_oldest(run_dir: Path, count: int, merges: int = 0) -> None:
    parts = [part for part in Folder(run_dir / "steps", "steps").parts() if part.name.merges == merges]
    merge(parts[:count])


def a_run(tmp_path: Path, parts: int) -> Path:
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / MANIFEST).write_text(json.dumps(manifest("one")))
    for number in range(parts):
        write_steps(spool, 10 * number, number)
    return spool


class Undeletable(Remote):
    """A store that may be written and from which nothing may be removed."""

    def remove(self, name: str) -> None:
        raise PermissionError(13, f"ACCESS_DENIED during DeleteObject: {name}")


def test_every_part_and_run_json_arrive_unchanged_and_the_spool_is_cleared(tmp_path: Path) -> None:
    spool = write_run(tmp_path, "spool")
    (spool / "control").mkdir()
    (spool / "control" / "journal.jsonl").write_text('{"status": "applied"}\n')
    before = files(spool)
    mirror = Mirror(spool, remote_at(tmp_path / "far"), contained=contained, tell=pytest.fail)
    assert mirror.close() is None
    assert files(tmp_path / "far") == before
    assert {name for name in before if name.endswith(".parquet")} & set(files(spool)) == set()
    assert (spool / MANIFEST).exists()


def test_what_is_up_already_is_not_uploaded_again(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 3), tmp_path / "far"
    Uploader(spool, remote_at(far)).run()
    old = time.time_ns() - 10**12
    for path in far.rglob("*.parquet"):
        os.utime(path, ns=(old, old))
    write_steps(spool, 30, 3)
    Uploader(spool, remote_at(far)).run()
    new = [path.name for path in far.rglob("*.parquet") if path.stat().st_mtime_ns != old]
    assert new == [str(PartName(30, 39, 3))]


def test_a_part_that_arrived_cut_off_is_uploaded_again(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 2), tmp_path / "far"
    shutil.copytree(spool / "steps", far / "steps")
    cut = far / "steps" / str(PartName(0, 9, 0))
    cut.write_bytes(cut.read_bytes()[:100])
    Uploader(spool, remote_at(far)).run()
    assert files(far / "steps") == files(spool / "steps")


def test_parts_go_up_with_alerts_first_and_coarse_tables_last_and_steps_before_what_they_govern() -> None:
    names = [
        f"coarse/16/steps/{PartName(0, 15, 0)}",
        f"attention/{PartName(0, 9, 0)}",
        f"steps/{PartName(0, 9, 0)}",
        f"steps/{PartName(10, 19, 1)}",
        f"spectra/{PartName(0, 9, 0)}",
        f"events/{PartName(12, 12, 1)}",
    ]
    found = waiting(dict.fromkeys(names, 1), {}, lambda _: frozenset())
    assert [upload.name for upload in found] == [
        f"events/{PartName(12, 12, 1)}",
        f"steps/{PartName(0, 9, 0)}",
        f"attention/{PartName(0, 9, 0)}",
        f"spectra/{PartName(0, 9, 0)}",
        f"steps/{PartName(10, 19, 1)}",
        f"coarse/16/steps/{PartName(0, 15, 0)}",
    ]


def test_merged_parts_take_the_place_of_what_they_replace(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 4), tmp_path / "far"
    uploader = Uploader(spool, remote_at(far))
    uploader.run()
    merge_oldest(spool, 3)
    uploader.run()
    assert files(far / "steps") == files(spool / "steps")
    assert len(files(far / "steps")) == 2


def test_every_step_is_there_once_while_what_was_replaced_is_still_there(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 4), tmp_path / "far"
    uploader = Uploader(spool, remote_at(far, Undeletable))
    uploader.run()
    merge_oldest(spool, 3)
    assert uploader.run()
    assert len(files(far / "steps")) == 5
    assert open_run(far).steps()["step"].tolist() == list(range(40))


def test_parts_merged_twice_while_nothing_could_be_uploaded_show_every_step_once(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 4), tmp_path / "far"
    Uploader(spool, remote_at(far)).run()
    merge_oldest(spool, 2)
    merge_oldest(spool, 2)
    merge_oldest(spool, 2, merges=1)
    assert [PartName.parse(name) for name in files(spool / "steps")] == [PartName(0, 39, 3, merges=2)]
    assert Uploader(spool, remote_at(far, Undeletable)).run()
    assert len(files(far / "steps")) == 5
    assert open_run(far).steps()["loss"].tolist() == [0.5 * step for step in range(40)]
    # And with a store that removes what it is told to, the merged part alone is left.
    assert Uploader(spool, remote_at(far)).run()
    assert list(files(far / "steps")) == [str(PartName(0, 39, 3, merges=2))]
    assert open_run(far).steps()["loss"].tolist() == [0.5 * step for step in range(40)]


def test_parts_of_other_attempts_and_machines_are_never_removed(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 2), tmp_path / "far"
    merge_oldest(spool, 2)
    (far / "steps").mkdir(parents=True)
    theirs = [PartName(0, 9, 0, attempt=2), PartName(0, 9, 1, rank=3), PartName(20, 29, 2), PartName(0, 9, 7)]
    for name in theirs:
        (far / "steps" / str(name)).write_bytes(b"theirs")
    Uploader(spool, remote_at(far)).run()
    assert {str(name) for name in theirs} < set(files(far / "steps"))


def test_a_rank_uploads_its_own_parts_and_leaves_run_json_to_rank_0(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 1), tmp_path / "far"
    own = PartName(0, 9, 0, rank=2)
    shutil.copy(spool / "steps" / str(PartName(0, 9, 0)), spool / "steps" / str(own))
    Uploader(spool, remote_at(far), 2).run()
    assert list(files(far)) == [f"steps/{own}"]


def test_a_store_that_cannot_be_written_is_told_once_and_gets_everything_when_it_can(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 2), tmp_path / "far"
    far.write_text("a file where the folder should be")
    told: list[str] = []
    heard = threading.Event()

    def tell(sentence: str) -> None:
        told.append(sentence)
        heard.set()

    mirror = Mirror(spool, remote_at(far), contained=contained, tell=tell)
    assert heard.wait(30.0)
    far.unlink()
    write_steps(spool, 20, 2)
    assert mirror.close() is None
    assert open_run(far).steps()["step"].tolist() == list(range(30))
    assert len(told) == 1
    assert str(spool) in told[0]


def test_close_gives_up_in_time_and_says_where_the_rest_is_and_what_uploads_it(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 2), tmp_path / "far"
    far.write_text("a file where the folder should be")
    mirror = Mirror(spool, remote_at(far), contained=contained, tell=lambda _: None)
    said = mirror.close(timeout_s=0.2)
    assert said is not None
    assert "2 part files" in said
    assert str(spool) in said
    assert "diagnostics compact far://far" in said
    assert len(files(spool / "steps")) == 2


def test_another_run_at_the_uri_is_left_alone(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 2), tmp_path / "far"
    mirror_told: list[str] = []
    far.mkdir()
    (far / MANIFEST).write_text(json.dumps(manifest("another", pid=4711, host="elsewhere")))
    mirror = Mirror(spool, remote_at(far), contained=contained, tell=mirror_told.append)
    said = mirror.close()
    assert list(files(far)) == [MANIFEST]
    assert said is not None
    assert "process 4711 on elsewhere" in said
    assert len(mirror_told) == 1


def test_run_json_of_a_later_attempt_elsewhere_stays_and_the_parts_arrive(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 2), tmp_path / "far"
    far.mkdir()
    (far / MANIFEST).write_text(json.dumps(manifest("one", attempt=2)))
    before = files(far)
    assert Uploader(spool, remote_at(far)).run(last=True)
    assert files(far) == {
        **before,
        **{f"steps/{name}": data for name, data in files(spool / "steps").items()},
    }


def test_how_a_run_ended_is_told_when_all_of_it_is_there(tmp_path: Path) -> None:
    class Watched(Remote):
        names: ClassVar[list[str]] = []

        def put_file(self, source: Path, name: str) -> None:
            self.names.append(name)
            super().put_file(source, name)

        def put(self, content: bytes, name: str) -> None:
            self.names.append(name)
            super().put(content, name)

    spool = a_run(tmp_path, 3)
    Uploader(spool, remote_at(tmp_path / "far", Watched)).run(last=True)
    assert Watched.names[-1] == MANIFEST
    assert Watched.names.count(MANIFEST) == 1


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://key:secret@bucket/a/b", "s3://bucket/a/b"),
        ("s3://key@bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a?region=eu-west-1&access_key=x", "s3://bucket/a?region=eu-west-1"),
        ("gs://anonymous@bucket/a", "gs://bucket/a"),
        (
            "abfs://container@account.dfs.core.windows.net/a",
            "abfs://container@account.dfs.core.windows.net/a",
        ),
        (
            "abfs://container:pw@account.dfs.core.windows.net/a",
            "abfs://container@account.dfs.core.windows.net/a",
        ),
        ("abfs://:pw@account/a", "abfs://account/a"),
    ],
)
def test_a_uri_is_written_down_without_anything_that_may_be_a_secret(uri: str, shown: str) -> None:
    assert shown_uri(uri) == shown


def test_a_uri_has_one_spool_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGNOSTICS_SPOOL", str(tmp_path))
    spool = spool_of("s3://bucket/team/run-1")
    assert spool.parent == tmp_path
    assert spool.name.startswith("run-1-")
    assert spool_of("s3://bucket/team/run-1/") == spool
    assert spool_of("s3://key:secret@bucket/team/run-1") == spool
    assert len({spool, spool_of("s3://bucket/other/run-1"), spool_of("gs://bucket/team/run-1")}) == 3


@pytest.mark.parametrize("uri", ["ftp://host/run", "s3:///run", "runs/local"])
def test_a_uri_that_names_no_store_is_refused(uri: str) -> None:
    with pytest.raises(DiagnosticsError):
        open_remote(uri)


def test_what_the_pass_costs_does_not_depend_on_what_was_uploaded_before(tmp_path: Path) -> None:
    class Counted(Remote):
        listings = 0

        def sizes(self) -> dict[str, int]:
            Counted.listings += 1
            return super().sizes()

    spool = a_run(tmp_path, 2)
    uploader: Any = Uploader(spool, remote_at(tmp_path / "far", Counted))
    for number in range(2, 6):
        uploader.run()
        write_steps(spool, 10 * number, number)
    assert Counted.listings == 1


def test_rows_that_are_in_the_tail_alone_keep_the_spool_and_are_told_of(tmp_path: Path) -> None:
    spool, far = a_run(tmp_path, 2), tmp_path / "far"
    (spool / "tail").mkdir()
    (spool / "tail" / "rows-000002.log").write_bytes(b"TDTAIL1\n")
    mirror = Mirror(spool, remote_at(far), contained=contained, tell=pytest.fail)
    said = mirror.close()
    assert said is not None
    assert "not all rows" in said
    assert "diagnostics compact far://far" in said
    assert files(far / "steps") == files(spool / "steps")


def test_a_client_that_writes_gives_up_after_seconds_and_keeps_what_the_uri_says() -> None:
    client: Any = open_remote("s3://bucket/run?region=eu-west-3&endpoint_override=127.0.0.1:1")._filesystem
    _, (options,) = client.__reduce__()
    assert options["request_timeout"] == options["connect_timeout"] == 10.0
    assert options["endpoint_override"] == "127.0.0.1:1"
    assert client.region == "eu-west-3"
