"""`settle`: what a dead writer left in `tail/` becomes part files, as its next flush would have written them.

Each generation of the tail becomes one part of each table that has rows in it, numbered as the generation, oldest
generation first; only then are its files removed. Rows of a table that has a part of this number or a later one
are in that part already and are left out, as readers leave them out. So every row is read once at any instant,
and after a kill at any instant settling again does the rest.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diagnostics.errors import NotARunError, RunExistsError
from diagnostics.store.format import SCHEMAS, TAIL, TEMPORARY_SUFFIX, PartName
from diagnostics.store.lock import holding
from diagnostics.store.manifest import may_be_written, read_manifest
from diagnostics.store.names import DAMAGED_SUFFIX, parts_in, table_folders, tail_in
from diagnostics.store.parts.file import WRITER_COLUMNS, write_part
from diagnostics.store.tail.decode import read_generation, read_steps, read_tables, scalar_names, steps_schema
from diagnostics.store.tail.name import TailName


@dataclass
class Settled:
    """What `settle` did.

    Attributes:
        rows: rows that are in part files now, by table.
        damaged: tail files that could not be read whole, by the name under which they are kept, and why.
        busy: ranks whose tail belongs to a process that records; it was left alone.
    """

    rows: dict[str, int] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    busy: list[int] = field(default_factory=list)


def settle(run_dir: Path, rank: int | None = None) -> Settled:
    """Turns what dead writers left in the tail into part files.

    Args:
        run_dir: the run directory.
        rank: the rank whose lock the caller holds; None: every rank that no process records, taking its lock.

    Raises:
        OSError: a part could not be written; the tail is still there.
    """
    result = Settled()
    if rank is not None:
        _settle_rank(run_dir, rank, result)
        return result
    for each in sorted({name.rank for name in tail_in(run_dir)}):
        try:
            with holding(run_dir, each) as lock:
                if _is_written_elsewhere(run_dir, lock_decides=lock.of_kernel):
                    result.busy.append(each)
                else:
                    _settle_rank(run_dir, each, result)
        except RunExistsError:
            result.busy.append(each)
    return result


def _settle_rank(run_dir: Path, rank: int, result: Settled) -> None:
    _remove_stale_temporaries(run_dir, rank)
    generations: dict[tuple[int, int], list[TailName]] = defaultdict(list)
    for name in tail_in(run_dir):
        if name.rank == rank:
            generations[name.number, name.attempt].append(name)
    if not generations:
        return
    last = {
        table: max((part.number for part in parts_in(run_dir / table, rank)), default=-1) for table in SCHEMAS
    }
    for (number, attempt), names in sorted(generations.items()):
        contents = [_Content.of(run_dir / TAIL / str(name), name) for name in sorted(names)]
        found = read_generation(
            [each.data for each in contents if each.name.kind == "steps"],
            b"".join(each.data for each in contents if each.name.kind == "rows"),
        )
        for table, rows in found.tables.items():
            if last[table] < number and rows.num_rows:
                if table == "steps":
                    rows = _with_earlier_scalars(run_dir, rank, rows)  # noqa: PLW2901 - the same rows
                first, final = pc.min_max(rows.column("step")).as_py().values()
                write_part(run_dir / table, PartName(first, final, number, attempt, rank), rows)
                result.rows[table] = result.rows.get(table, 0) + rows.num_rows
        for each in contents:
            each.put_away(result, suspect=bool(found.damage))


@dataclass(frozen=True)
class _Content:
    """A tail file as it was read; with words where it could not be."""

    path: Path
    name: TailName
    data: bytes
    failure: str | None = None

    @classmethod
    def of(cls, path: Path, name: TailName) -> "_Content":
        try:
            return cls(path, name, path.read_bytes())
        except OSError as error:
            return cls(path, name, b"", str(error))

    def put_away(self, result: Settled, *, suspect: bool) -> None:
        """Removes the file; one that is damaged is kept beside, for whoever can make more of it.

        Args:
            result: is told of it.
            suspect: whether the damage of its generation may lie in this file.
        """
        damage = self.failure or (self._damage() if suspect else None)
        if damage is None:
            self.path.unlink(missing_ok=True)
            return
        kept = self.path.with_name(self.path.name + DAMAGED_SUFFIX)
        self.path.rename(kept)
        result.damaged[f"{TAIL}/{kept.name}"] = damage

    def _damage(self) -> str | None:
        read = read_steps if self.name.kind == "steps" else read_tables
        return "; ".join(read(self.data).damage) or None


def _with_earlier_scalars(run_dir: Path, rank: int, rows: pa.Table) -> pa.Table:
    """The rows with the scalars of earlier parts too, as null: readers that glob want the same columns everywhere."""
    parts = parts_in(run_dir / "steps", rank)
    if not parts:
        return rows
    newest = max(parts, key=lambda part: part.number)
    try:
        earlier = pq.read_schema(run_dir / "steps" / str(newest))
    except (pa.ArrowException, OSError):
        return rows
    for column in steps_schema(scalar_names([dict.fromkeys(earlier.names)])):
        if column.name not in (*rows.column_names, *WRITER_COLUMNS):
            rows = rows.append_column(column, pa.nulls(rows.num_rows, column.type))
    return rows


def _is_written_elsewhere(run_dir: Path, *, lock_decides: bool) -> bool:
    try:
        manifest = read_manifest(run_dir)
    except NotARunError:
        return False
    return may_be_written(manifest, lock_decides=lock_decides)


def _remove_stale_temporaries(run_dir: Path, rank: int) -> None:
    for folder in table_folders(run_dir):
        for path in folder.glob(f".part-*{TEMPORARY_SUFFIX}"):
            part = PartName.parse(path.name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX))
            if part is not None and part.rank == rank:
                path.unlink(missing_ok=True)
