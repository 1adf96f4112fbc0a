"""The run directory on disk: file names, tables, columns, units, version. Nothing else knows them.

run.json                          manifest, replaced atomically
steps/ attention/ ... /           part files, `part-<first step>-<last step>-<number>.parquet`
control/inbox/<id>.json           commands; control/journal.jsonl: what the run did with them
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

SCHEMA_VERSION = 1
MANIFEST = "run.json"
CONTROL_INBOX = Path("control") / "inbox"
CONTROL_JOURNAL = Path("control") / "journal.jsonl"
TEMPORARY_SUFFIX = ".tmp"

# A manifest whose heartbeat is older than this belongs to a process that died or hangs.
HEARTBEAT_PERIOD_S = 2.0
HEARTBEAT_LOST_S = 30.0


@dataclass(frozen=True)
class Column:
    """One column: name, Arrow type, unit and meaning; the last two travel in the field's metadata."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, metadata={"unit": self.unit, "meaning": self.meaning})


_STEP = Column("step", pa.int64(), "optimizer steps", "counted from 0")
_LAYER = Column("layer", pa.string(), "", "module path as named_modules() gives it")
_HEAD = Column("head", pa.int16(), "", "index of the query head")

TABLES: dict[str, tuple[Column, ...]] = {
    "steps": (
        _STEP,
        Column("time_s", pa.float64(), "s", "unix time at which the step was closed"),
        Column("loss", pa.float64(), "", "as handed to recorder.step"),
        Column("lr", pa.float64(), "", "learning rate of the first parameter group"),
        Column("grad_norm", pa.float64(), "", "2-norm of all gradients the optimizer used"),
        Column("measured", pa.bool_(), "", "whether the step was a measured one"),
        Column(
            "overhead_s", pa.float64(), "s", "time the recorder took from the training thread in this step"
        ),
    ),
    "attention": (
        _STEP,
        _LAYER,
        _HEAD,
        Column("entropy", pa.float32(), "nats", "attention entropy, mean over the observed query rows"),
        Column("entropy_min", pa.float32(), "nats", "lowest attention entropy of the observed query rows"),
        Column(
            "entropy_frac", pa.float32(), "", "mean of entropy / ln(visible keys), rows with two keys or more"
        ),
        Column(
            "entropy_bound",
            pa.float32(),
            "nats",
            "lower bound, Theorem 3.1 of arXiv 2303.06296, from the row norms",
        ),
        Column("max_logit", pa.float32(), "", "largest scaled logit over the observed rows"),
        Column(
            "rank_frac", pa.float32(), "", "effective rank of the attention map over observed rows / rows"
        ),
        Column("rows", pa.int32(), "query rows", "observed rows"),
    ),
    "spectra": (
        _STEP,
        _LAYER,
        _HEAD,
        Column("sigma1", pa.float32(), "", "largest singular value of Wq_h^T Wk_h"),
        Column("frobenius", pa.float32(), "", "Frobenius norm of Wq_h^T Wk_h"),
        Column("sec_1", pa.float32(), "", "share of the spectral energy in the largest singular value"),
        Column("sec_4", pa.float32(), "", "share of the spectral energy in the 4 largest singular values"),
        Column("sec_10", pa.float32(), "", "share of the spectral energy in the 10 largest singular values"),
        Column("stable_rank", pa.float32(), "", "squared Frobenius norm / squared sigma1"),
        Column(
            "effective_rank",
            pa.float32(),
            "",
            "exp of the entropy of sigma / sum(sigma) (Roy and Vetterli 2007)",
        ),
        Column("singular_values", pa.list_(pa.float32()), "", "of Wq_h^T Wk_h, descending"),
    ),
    "updates": (
        _STEP,
        Column("parameter", pa.string(), "", "name as named_parameters() gives it"),
        Column("sigma1", pa.float32(), "", "largest singular value of the weight before the step"),
        Column("update_sigma1", pa.float32(), "", "largest singular value of the step's update"),
        Column("ratio", pa.float32(), "", "update_sigma1 / sigma1"),
        Column("frobenius_ratio", pa.float32(), "", "Frobenius norm of the update / of the weight before"),
        Column(
            "scale",
            pa.float32(),
            "",
            "what the spectral bound multiplied the update by; 1 where it did not fire",
        ),
    ),
    "events": (
        _STEP,
        Column("time_s", pa.float64(), "s", "unix time"),
        Column("kind", pa.string(), "", "alert, control, suggestion, warning or fault"),
        Column("severity", pa.string(), "", "info, warning or critical"),
        _LAYER,
        _HEAD,
        Column("message", pa.string(), "", "one sentence for people"),
        Column("data", pa.string(), "JSON", "details for programs"),
    ),
}

SCHEMAS: dict[str, pa.Schema] = {
    table: pa.schema([column.field for column in columns]) for table, columns in TABLES.items()
}


def part_name(first_step: int, last_step: int, number: int) -> str:
    """Name of a part file; step range first, so that a reader can leave a file unopened.

    Args:
        first_step: smallest step in the file.
        last_step: largest step in the file.
        number: the writer's running number, which makes the name unique.
    """
    return f"part-{first_step:012d}-{last_step:012d}-{number:06d}.parquet"


def part_steps(name: str) -> tuple[int, int] | None:
    """The step range in a part file's name, or None for a name that is not a part file's."""
    stem, dot, suffix = name.partition(".")
    pieces = stem.split("-")
    if not dot or suffix != "parquet" or len(pieces) != 4 or pieces[0] != "part":  # noqa: PLR2004 - the form above
        return None
    first, last = pieces[1], pieces[2]
    return (int(first), int(last)) if first.isdigit() and last.isdigit() else None


def metric_metadata() -> dict[str, dict[str, dict[str, str]]]:
    """Unit and meaning of every column, written into run.json so that a run explains itself."""
    return {
        table: {column.name: {"unit": column.unit, "meaning": column.meaning} for column in columns}
        for table, columns in TABLES.items()
    }
