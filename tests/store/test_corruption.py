"""Files that are damaged, foreign or gone: named, left out, counted; what is intact is read to the last row."""

import json
import random
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from dying import check_coarse, late, noisy
from scribe import Scribe

from diagnostics.errors import DamagedDataWarning, DiagnosticsError, NotARunError
from diagnostics.report import assess
from diagnostics.store import write
from diagnostics.store.compact import compact_run
from diagnostics.store.format import COARSE, MANIFEST, TABLES, TAIL, PartName
from diagnostics.store.lock import lock_path
from diagnostics.store.parts import merging
from diagnostics.store.parts.merge import folders
from diagnostics.store.read import Run, open_run
from diagnostics.store.tail.decode import read_steps, read_tables
from diagnostics.store.tail.name import TailName
from diagnostics.store.tail.settle import settle

# Rows by table, each as its step and all of it in words, how often each is there.
Rows = dict[str, Counter[tuple[int, str]]]


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed between two flushes: parts, merged parts, coarse parts, a tail with both kinds of file."""
    root = tmp_path_factory.mktemp("dead")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "FAN_IN", 3)
        patch.setattr(write, "_LEAST_BUCKETS", 1)
        scribe = Scribe(root / "run", segment_bytes=4096)
        for step in range(48):
            scribe.step(0.5 * step, {"noisy": noisy(step), "late": late(step)})
            if step % 2 == 0:
                scribe.measure(1.0 + step)
            if step % 6 == 5 and step < 36:
                scribe.event("an alarm", step)
                scribe.flush()
                if step == 23:  # four parts: three become one
                    for folder in folders(root / "run"):
                        merging.merge_folder(folder, merging.due, damaged={})
        scribe.look()
        scribe.die(root / "dead")
    assert all(_kinds(root / "dead").values()), _kinds(root / "dead")
    return root / "dead"


def _kinds(run_dir: Path) -> dict[str, list[Path]]:
    """Files by what they are; of each table one part, one merged and one coarse at least."""
    parts = [part for part in sorted(run_dir.rglob("part-*.parquet")) if PartName.parse(part.name)]
    found: dict[str, list[Path]] = {}
    for table in ("steps", "attention", "spectra", "updates"):
        own = [part for part in parts if part.parent.name == table]
        raw = [part for part in own if COARSE not in part.parts]
        found[f"{table} part"] = [part for part in raw if "m" not in part.stem.rpartition("-")[2]]
        found[f"{table} merged"] = [part for part in raw if "m" in part.stem.rpartition("-")[2]]
        found[f"{table} coarse"] = [part for part in own if COARSE in part.parts]
    tail = {path: TailName.parse(path.name) for path in sorted((run_dir / TAIL).iterdir())}
    found["segment"] = [
        path
        for path, name in tail.items()
        if name and name.kind == "steps" and len(read_steps(path.read_bytes()).rows) > 1
    ]
    found["rows log"] = [
        path
        for path, name in tail.items()
        if name and name.kind == "rows" and len(read_tables(path.read_bytes()).batches) > 1
    ]
    return found


def rows_of(run: Run) -> Rows:
    return {table: _counted(run.table(table).to_pylist()) for table in TABLES}


def _counted(rows: list[dict[str, Any]]) -> Counter[tuple[int, str]]:
    return Counter((row["step"], repr(sorted(row.items()))) for row in rows)


def _rows_in(part: Path) -> Counter[tuple[int, str]]:
    names = open_run(part.parents[1]).table(part.parent.name).column_names
    with pq.ParquetFile(part) as file:
        rows = file.read().to_pylist()
    return _counted([{name: row.get(name) for name in names} for row in rows])


def _flip(path: Path) -> None:
    """Among the values, in the middle of what lies before the footer."""
    data = bytearray(path.read_bytes())
    end = _footer(data) if path.suffix == ".parquet" else len(bytes(data).rstrip(b"\0")) // 2
    data[end // 2] ^= 0x10
    path.write_bytes(data)


def _footer(data: bytes | bytearray) -> int:
    """Where the footer of a Parquet file begins."""
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _swap(path: Path) -> None:
    """The file of another table under this name."""
    other = {"steps": "attention", "attention": "updates", "spectra": "steps", "updates": "spectra"}
    table = path.parent.name
    donors = sorted(path.parent.with_name(other[table]).glob("part-*.parquet"))
    path.write_bytes(donors[0].read_bytes())


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere.parquet"))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "one bit flipped": _flip,
    "cut in half": _half,
    "cut to nothing": lambda path: path.write_bytes(b""),
    "cut to its magic": lambda path: path.write_bytes(path.read_bytes()[:4]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_bytes(b"PAR1 is what a text may begin and end with PAR1"),
    "another table's": _swap,
    "a folder": _folder,
    "a link to nowhere": _dangling,
}


def read_damaged(run_dir: Path) -> tuple[Run, Rows, list[str]]:
    """The run, its rows, and what the reader warned of."""
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        run = open_run(run_dir)
        rows = rows_of(run)
    assert all(warning.category is DamagedDataWarning for warning in met), [str(one.message) for one in met]
    return run, rows, [str(warning.message) for warning in met]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("part", "steps"),
        ("part", "attention"),
        ("part", "spectra"),
        ("part", "updates"),
        ("merged", "attention"),
    ],
)
def test_a_damaged_part_is_named_and_all_other_rows_are_read(
    dead: Path, tmp_path: Path, kind: str, table: str, damage: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    before = rows_of(open_run(run_dir))
    path = _kinds(run_dir)[f"{table} {kind}"][0]
    expected = {**before, table: before[table] - _rows_in(path)}
    DAMAGES[damage](path)
    name = str(path.relative_to(run_dir))
    run, rows, warned = read_damaged(run_dir)
    if damage == "one bit flipped" and not run.damaged:
        # Some bits stand for nothing that is read.
        assert rows == before
        return
    assert list(run.damaged) == [name]
    assert len([words for words in warned if path.name in words]) == 1
    assert rows == expected
    # Settling and merging leave it as it is, and move no other row.
    settle(run_dir)
    _, rows, _ = read_damaged(run_dir)
    assert rows == expected
    compact_run(run_dir)
    run, rows, _ = read_damaged(run_dir)
    assert rows == expected
    assert name in run.damaged


def test_no_flipped_bit_in_a_part_changes_a_value_in_silence(dead: Path, tmp_path: Path) -> None:
    chance = random.Random(7)  # noqa: S311 - no secret
    shutil.copytree(dead, tmp_path / "run")
    run_dir = tmp_path / "run"
    told = silent = 0
    wrong: list[str] = []
    for kind in ("steps part", "attention part", "spectra merged", "updates merged"):
        path = _kinds(run_dir)[kind][0]
        table = path.parent.name
        whole = path.read_bytes()
        footer = _footer(whole)
        before = rows_of(open_run(run_dir))
        for _ in range(30):
            at, bit = chance.randrange(footer), chance.randrange(8)
            data = bytearray(whole)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            run, rows, _ = read_damaged(run_dir)
            if run.damaged:
                told += 1
            elif rows[table] == before[table]:
                silent += 1
            else:
                wrong.append(f"{path.relative_to(run_dir)} byte {at} bit {bit}")
        path.write_bytes(whole)
    assert wrong == [], f"{len(wrong)} of 120 flips changed rows and were not told"
    assert told > silent


@pytest.mark.parametrize("resolution", [16])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("table", ["steps", "attention"])
def test_a_damaged_coarse_part_is_made_good_from_the_rows(
    dead: Path, tmp_path: Path, table: str, damage: str, resolution: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    path = _kinds(run_dir)[f"{table} coarse"][0]
    DAMAGES[damage](path)
    run = open_run(run_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedDataWarning)
        check_coarse(run, resolution)
    if damage != "one bit flipped":  # some bits stand for nothing that is read
        assert str(path.relative_to(run_dir)) in run.damaged


# --- the tail ---------------------------------------------------------------------------------------------


def _frames(data: bytes) -> list[tuple[int, int]]:
    """Beginning and end of each frame of a tail file."""
    found, position = [], 8
    while position + 8 <= len(data) and (length := int.from_bytes(data[position : position + 4], "little")):
        found.append((position, position + 8 + length))
        position += 8 + length
    return found


@pytest.mark.parametrize("kind", ["segment", "rows log"])
def test_a_flipped_bit_in_the_tail_costs_the_frame_it_is_in(dead: Path, tmp_path: Path, kind: str) -> None:
    chance = random.Random(8)  # noqa: S311 - no secret
    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    before = rows_of(open_run(run_dir))
    path = _kinds(run_dir)[kind][0]
    whole = path.read_bytes()
    frames = _frames(whole)
    for number, (begin, end) in enumerate(frames):
        data = bytearray(whole)
        data[chance.randrange(begin, end)] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        run, rows, warned = read_damaged(run_dir)
        lost = sum((before[table] - rows[table]).total() for table in TABLES)
        gained = sum((rows[table] - before[table]).total() for table in TABLES)
        payload = whole[begin + 8 : end]
        if number == len(frames) - 1:
            # The last one may be one that was being written: nobody can tell.
            assert run.damaged == {} or list(run.damaged) == [str(path.relative_to(run_dir))]
        else:
            assert list(run.damaged) == [str(path.relative_to(run_dir))], f"frame {number} at {begin}"
            assert warned
        if payload[:1] == b"S":
            assert (lost, gained) == (1, 0), f"frame {number}"
        elif payload[:1] == b"T":
            # Its rows, or fewer where they are in a part already.
            assert gained == 0
            assert all(
                before[table] - rows[table] == Counter() for table in TABLES if table not in repr(payload)
            )
        else:
            # Without the names of scalars the steps are there still, their scalars null.
            assert [row["step"] for row in run.table("steps").to_pylist()] == sorted(
                row["step"] for row in open_run(dead).table("steps").to_pylist()
            )
    path.write_bytes(whole)


TAIL_DAMAGES = {name: DAMAGES[name] for name in DAMAGES if name != "another table's"}


@pytest.mark.parametrize("damage", TAIL_DAMAGES)
@pytest.mark.parametrize("kind", ["segment", "rows log"])
def test_a_tail_file_that_is_gone_to_pieces_costs_its_own_rows_only(
    dead: Path, tmp_path: Path, kind: str, damage: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    before = rows_of(open_run(run_dir))
    path = _kinds(run_dir)[kind][0]
    data = path.read_bytes()
    if kind == "segment":
        own = {"steps": {row["step"] for row in read_steps(data).rows}}
    else:
        own = {}
        for table, batch in read_tables(data).batches:
            own.setdefault(table, set()).update(batch.column("step").to_pylist())
    TAIL_DAMAGES[damage](path)
    run, rows, _ = read_damaged(run_dir)
    for table in TABLES:
        lost = before[table] - rows[table]
        assert rows[table] - before[table] == Counter()
        assert {step for step, _ in lost} <= own.get(table, set())
    # A file of zeros, or an empty one, is one that was not begun.
    if damage not in {"cut to nothing", "cut to its magic", "zeros", "cut in half"}:
        assert str(path.relative_to(run_dir)) in run.damaged
    kept = rows
    settle(run_dir)
    run, rows, _ = read_damaged(run_dir)
    assert rows == kept
    if damage not in {"cut to nothing", "cut to its magic", "zeros", "cut in half"}:
        assert run.damaged, "what was damaged is not told any more once it is settled"


# --- what does not belong there ---------------------------------------------------------------------------


def test_foreign_files_and_leftovers_change_nothing_that_is_read(dead: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    before = rows_of(open_run(run_dir))
    for folder in ("steps", "attention", TAIL, COARSE, f"{COARSE}/16", f"{COARSE}/16/steps", "."):
        (run_dir / folder / "notes.txt").write_text("mine")
        (run_dir / folder / ".DS_Store").write_bytes(b"\0\1\2")
        (run_dir / folder / ".part-000000000000-000000000003-000007.parquet.tmp").write_bytes(b"PAR1")
        (run_dir / folder / "folder").mkdir()
        (run_dir / folder / "folder" / "part-000000000000-000000000003-000007.parquet").write_bytes(b"PAR1")
        (run_dir / folder / "nowhere").symlink_to("missing")
    (run_dir / TAIL / "steps-000001-0000.log.bak").write_bytes(b"x")
    (run_dir / "run.json.bak").write_text("{")
    run, rows, warned = read_damaged(run_dir)
    assert (rows, run.damaged, warned) == (before, {}, [])
    compact_run(run_dir)
    run, rows, warned = read_damaged(run_dir)
    assert (rows, run.damaged, warned) == (before, {}, [])


def test_a_parquet_file_of_another_name_is_named_and_not_read(dead: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    before = rows_of(open_run(run_dir))
    shutil.copy(_kinds(run_dir)["steps part"][0], run_dir / "steps" / "copy of part.parquet")
    run, rows, _ = read_damaged(run_dir)
    assert rows == before
    assert list(run.damaged) == ["steps/copy of part.parquet"]


# --- run.json and the lock --------------------------------------------------------------------------------

MANIFESTS: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "cut in half": lambda text: text[: len(text) // 2],
    "zeros": lambda text: "\0" * len(text),
    "a list": lambda _: "[1, 2]",
    "no version": lambda _: "{}",
    "text": lambda _: "not json",
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_an_error_in_words(dead: Path, tmp_path: Path, damage: str) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    path = run_dir / MANIFEST
    path.write_text(MANIFESTS[damage](path.read_text()))
    with pytest.raises(NotARunError, match=MANIFEST):
        open_run(run_dir)
    with pytest.raises(DiagnosticsError):
        compact_run(run_dir)


_WRONG = (None, "x", -1, 2**70, 1e300, [1], {"a": None}, True)


@pytest.mark.parametrize("wrong", _WRONG, ids=repr)
def test_a_manifest_with_entries_of_a_wrong_kind_breaks_no_reader(
    dead: Path, tmp_path: Path, wrong: object
) -> None:
    from diagnostics.app.data import Reader  # noqa: PLC0415 - reads with streamlit's siblings

    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    path = run_dir / MANIFEST
    manifest = json.loads(path.read_text())
    before = rows_of(open_run(run_dir))
    reader = Reader()
    for key in manifest:
        if key == "schema_version":
            continue
        path.write_text(json.dumps({**manifest, key: wrong}))
        assert isinstance(open_run(run_dir).info["state"], str), key
        assert assess(run_dir).status, key
        reader.curves(run_dir)
        reader.overhead(run_dir)
    assert rows_of(open_run(run_dir)) == before
    settle(run_dir)
    assert rows_of(open_run(run_dir)) == before


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 512, b"{", b"[1]", b'{"pid": [], "host": 3, "attempt": "x"}']
)
def test_a_damaged_note_in_the_lock_keeps_nobody_out(dead: Path, tmp_path: Path, content: bytes) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    before = rows_of(open_run(run_dir))
    lock_path(run_dir).write_bytes(content)
    assert rows_of(open_run(run_dir)) == before
    scribe = Scribe(run_dir)
    assert scribe.claim.attempt == 2
    scribe.let_go()
    assert rows_of(open_run(run_dir)) == before


def test_a_lock_that_is_a_folder_is_an_error_in_words(dead: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(dead, run_dir)
    before = rows_of(open_run(run_dir))
    lock_path(run_dir).unlink()
    lock_path(run_dir).mkdir()
    with pytest.raises(DiagnosticsError, match="cannot be written"):
        Scribe(run_dir)
    assert rows_of(open_run(run_dir)) == before


# --- people are told --------------------------------------------------------------------------------------


def _diagnostics(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "diagnostics", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_report_list_and_dashboard_go_on_and_say_what_is_missing(dead: Path, tmp_path: Path) -> None:
    from diagnostics.app.data import Reader  # noqa: PLC0415 - reads with streamlit's siblings

    run_dir = tmp_path / "root" / "run"
    shutil.copytree(dead, run_dir)
    kinds = _kinds(run_dir)
    gone = [
        kinds["steps part"][0],
        kinds["attention part"][0],
        kinds["updates merged"][0],
        kinds["segment"][0],
    ]
    names = [str(path.relative_to(run_dir)) for path in gone]
    for path in gone[:3]:
        _half(path)
    data = bytearray(gone[3].read_bytes())
    begin, end = _frames(bytes(data))[1]
    data[(begin + end) // 2] ^= 1
    gone[3].write_bytes(data)

    told = _diagnostics("report", str(run_dir), "--json")
    assert told.returncode in {0, 1}, told.stderr
    missing = " ".join(json.loads(told.stdout)["runs"][0]["missing"])
    assert [name for name in names if name not in missing] == []
    told = _diagnostics("report", str(run_dir))
    assert [name for name in names if Path(name).name not in told.stdout + told.stderr] == []
    assert "Traceback" not in told.stderr

    told = _diagnostics("list", str(tmp_path / "root"), "--json")
    assert told.returncode == 0, told.stderr
    assert [run["name"] for run in json.loads(told.stdout)["runs"]] == ["run"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedDataWarning)
        reader = Reader()
        reader.curves(run_dir)
        reader.report(run_dir)
        for table in TABLES:
            reader.table(run_dir, table)
    assert [name for name in names if name not in reader.damaged(run_dir)] == []


def test_a_run_whose_manifest_is_damaged_does_not_hide_the_others(dead: Path, tmp_path: Path) -> None:
    for name in ("good", "bad"):
        shutil.copytree(dead, tmp_path / "root" / name)
    (tmp_path / "root" / "bad" / MANIFEST).write_text("{")
    told = _diagnostics("list", str(tmp_path / "root"), "--json")
    assert "good" in told.stdout
    assert "Traceback" not in told.stderr
    assert "bad" in told.stdout + told.stderr
