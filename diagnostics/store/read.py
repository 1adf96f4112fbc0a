"""Reading a run directory: `open_run`, `Run`, and the runs below a root. Works while the run is written."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diagnostics.errors import DamagedDataWarning, DiagnosticsError, NotARunError
from diagnostics.store.format import MANIFEST, SCHEMAS, TABLES, part_steps
from diagnostics.store.manifest import Manifest, live_state, read_manifest
from diagnostics.store.merged import merged_parts, without_replaced

_SORT_KEYS = ("step", "layer", "head", "parameter")


class Run:
    """One run directory, read-only.

    Every table method returns a pandas DataFrame in step order and takes the same arguments:

    Args:
        columns: the columns to read, in this order (None: all); others are not read from disk.
        start_step: first step wanted, inclusive (None: from the beginning).
        end_step: last step wanted, inclusive (None: to the end).

    Raises:
        NotARunError: the path holds no run.
        NewerSchemaError: the run's format is newer than this release.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._manifest = read_manifest(self.path)
        self.damaged: dict[str, str] = {}
        """Files that could not be read so far, and why."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def info(self) -> Manifest:
        """The manifest (`run.json`) as it stands now, with `state` judged: running, stalled, crashed, finished."""
        # The manifest is replaced while the run lives; the last good one serves where it is gone by now.
        try:
            self._manifest = read_manifest(self.path)
        except NotARunError as error:
            self.damaged[MANIFEST] = str(error)
        return {**self._manifest, "state": live_state(self._manifest)}

    def steps(
        self, columns: Sequence[str] | None = None, start_step: int | None = None, end_step: int | None = None
    ) -> pd.DataFrame:
        """One row per step: loss, lr, grad_norm and the scalars the user handed in."""
        return self._frame("steps", columns, start_step, end_step)

    def attention(
        self, columns: Sequence[str] | None = None, start_step: int | None = None, end_step: int | None = None
    ) -> pd.DataFrame:
        """One row per measured step, layer and query head: entropy, max logit, map rank."""
        return self._frame("attention", columns, start_step, end_step)

    def spectra(
        self, columns: Sequence[str] | None = None, start_step: int | None = None, end_step: int | None = None
    ) -> pd.DataFrame:
        """One row per measured step, layer and query head: spectrum of Wq_h^T Wk_h."""
        return self._frame("spectra", columns, start_step, end_step)

    def updates(
        self, columns: Sequence[str] | None = None, start_step: int | None = None, end_step: int | None = None
    ) -> pd.DataFrame:
        """One row per measured step and matrix: size of the step's update against the weight."""
        return self._frame("updates", columns, start_step, end_step)

    def events(
        self, columns: Sequence[str] | None = None, start_step: int | None = None, end_step: int | None = None
    ) -> pd.DataFrame:
        """One row per alert, control command, warning or fault."""
        return self._frame("events", columns, start_step, end_step)

    def table(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
    ) -> pa.Table:
        """The Arrow table behind the DataFrame of the same name; same arguments."""
        if name not in TABLES:
            raise DiagnosticsError(f"there is no table {name!r}; the tables are {', '.join(TABLES)}")
        if columns is not None and not columns:
            raise DiagnosticsError(
                "columns=[] asks for nothing; name at least one column, or leave it out for all"
            )
        wanted = None if columns is None else list(dict.fromkeys((*columns, "step")))
        parts = [*self._parts(name, wanted, start_step, end_step), SCHEMAS[name].empty_table()]
        table = pa.concat_tables(parts, promote_options="default")
        if columns is not None and (
            unknown := [column for column in columns if column not in table.column_names]
        ):
            raise DiagnosticsError(
                f"table {name!r} has no column {unknown[0]!r}; it has {', '.join(self._known_columns(name))}"
            )
        if start_step is not None:
            table = table.filter(pc.field("step") >= start_step)
        if end_step is not None:
            table = table.filter(pc.field("step") <= end_step)
        table = table.sort_by([(key, "ascending") for key in _SORT_KEYS if key in table.column_names])
        return table if columns is None else table.select(list(columns))

    def _parts(
        self, name: str, wanted: list[str] | None, start_step: int | None, end_step: int | None
    ) -> list[pa.Table]:
        # A merge meanwhile may take away files that were listed and not read yet: their rows are in a merged
        # part that was not listed. Compacting ends, and so does this.
        while True:
            merged = merged_parts(self.path / name)
            parts = [self._read(path, wanted) for path in self._part_paths(name, start_step, end_step)]
            if merged_parts(self.path / name) == merged:
                return [part for part in parts if part is not None]

    def _frame(
        self, name: str, columns: Sequence[str] | None, start_step: int | None, end_step: int | None
    ) -> pd.DataFrame:
        table = self.table(name, columns, start_step, end_step)
        frame: pd.DataFrame = table.to_pandas()
        if "head" in table.column_names and table.column("head").null_count:
            frame["head"] = table.column("head").to_pandas(types_mapper={pa.int16(): pd.Int16Dtype()}.get)
        return frame

    def _part_paths(self, table: str, start_step: int | None, end_step: int | None) -> list[Path]:
        """The part files that hold steps of the range, without those that a merged one among them replaces."""
        return without_replaced(self._parts_in_range(table, start_step, end_step))

    def _parts_in_range(self, table: str, start_step: int | None, end_step: int | None) -> Iterator[Path]:
        folder = self.path / table
        if not folder.is_dir():
            return
        for path in sorted(folder.iterdir()):
            steps = part_steps(path.name)
            if steps is None:
                if path.suffix == ".parquet":
                    self._skip(path, "its name is not one that a Recorder gives")
                continue
            if (end_step is not None and steps[0] > end_step) or (
                start_step is not None and steps[1] < start_step
            ):
                continue
            yield path

    def _read(self, path: Path, wanted: list[str] | None) -> pa.Table | None:
        try:
            file = pq.ParquetFile(path)
            present = None if wanted is None else [name for name in wanted if name in file.schema_arrow.names]
            part = file.read(columns=present)
            schema = SCHEMAS[path.parent.name]
            if not {"step"} <= set(part.column_names):
                self._skip(path, "it has no column 'step'")
                return None
            return part.cast(
                pa.schema(
                    [
                        schema.field(n) if n in schema.names else part.schema.field(n)
                        for n in part.column_names
                    ]
                )
            )
        except FileNotFoundError:
            return None  # merged into another part since the folder was listed
        except (pa.ArrowException, OSError) as error:
            self._skip(path, str(error))
            return None

    def _skip(self, path: Path, reason: str) -> None:
        key = str(path.relative_to(self.path))
        if key not in self.damaged:
            self.damaged[key] = reason
            warnings.warn(
                f"{path} is damaged and was skipped, the rest of the run is read: {reason}",
                DamagedDataWarning,
                stacklevel=4,
            )

    def _known_columns(self, table: str) -> list[str]:
        names = list(SCHEMAS[table].names)
        for path in self._part_paths(table, None, None):
            part = self._read(path, None)
            names += [name for name in (part.column_names if part else []) if name not in names]
        return names


def open_run(path: str | os.PathLike[str]) -> Run:
    """Opens a run directory for reading, finished or still being written; imports no torch.

    Args:
        path: the directory that a Recorder writes to.

    Raises:
        NotARunError: the path holds no run.
        NewerSchemaError: the run's format is newer than this release.
    """
    return Run(path)


def find_runs(root: str | os.PathLike[str]) -> list[Path]:
    """The run directories at or below `root`, in name order; looks inside no run.

    Raises:
        NotARunError: `root` is no directory.
    """
    top = Path(root)
    if not top.is_dir():
        raise NotARunError(f"{top} is not a directory; give a run directory or a directory that holds runs")
    found: list[Path] = []
    for folder, subfolders, files in os.walk(top):
        if MANIFEST in files:
            found.append(Path(folder))
            subfolders.clear()
        else:
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    return found
