"""The run directory on disk: file names, tables, columns, units, version. Nothing else knows them.

run.json                          manifest, replaced atomically
steps/ attention/ ... /           part files, see `PartName`
tail/                             what is not in part files yet, see tail/frames.py
coarse/<steps>/<table>/           part files of min, max, mean and last over so many steps, see coarse/tables.py
control/inbox/<id>.json           commands; control/journal.jsonl: what the run did with them
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

SCHEMA_VERSION = 2
MANIFEST = "run.json"
TAIL = "tail"
COARSE = "coarse"
CONTROL_INBOX = Path("control") / "inbox"
CONTROL_JOURNAL = Path("control") / "journal.jsonl"
TEMPORARY_SUFFIX = ".tmp"

RESOLUTIONS = (16, 256, 4096)
"""Optimizer steps that one row of a coarse table stands for."""

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

STEP_SCALARS: tuple[Column, ...] = (
    Column(
        "adam_rms",
        pa.float64(),
        "",
        "largest RMS_t = sqrt(mean(g^2 / max(v, eps^2))) of a parameter under Adam or its kin (arXiv 2304.13013)",
    ),
)
"""Columns of `steps` that the recorder adds where it measured them, behind the contract's, like a user's scalars."""


def scalar_field(name: str) -> pa.Field:
    """The field of a column of `steps` behind the contract's: the recorder's own, or a user's scalar."""
    own = {column.name: column.field for column in STEP_SCALARS}
    return own.get(name, Column(name, pa.float64(), "", "user scalar").field)


SCHEMAS: dict[str, pa.Schema] = {
    table: pa.schema([column.field for column in columns]) for table, columns in TABLES.items()
}


_PART = re.compile(
    r"part-(?P<first>\d+)-(?P<last>\d+)-(?P<number>\d+)"
    r"(?:a(?P<attempt>\d+))?(?:r(?P<rank>\d+))?(?:m(?P<merges>\d+))?\.parquet"
)


@dataclass(frozen=True, order=True)
class PartName:
    """A part file's name: all that a reader needs to leave the file unopened.

    `part-<first>-<last>-<number>[a<attempt>][r<rank>][m<merges>].parquet`; an attempt of 1, a rank of 0 and
    merges of 0 are left out.

    Attributes:
        first_step: smallest step in the file.
        last_step: largest step in the file.
        number: running number of the flush that wrote it, the same for every table, never used twice by a rank
            in a run; of a merged file the largest number it stands for.
        attempt: which attempt at the run wrote it, counted from 1: each resume is one more.
        rank: rank of the process in a distributed job.
        merges: how often its oldest rows have been merged.
    """

    first_step: int
    last_step: int
    number: int
    attempt: int = 1
    rank: int = 0
    merges: int = 0

    def __str__(self) -> str:
        tags = writer_tag(self.attempt, self.rank) + (f"m{self.merges}" if self.merges else "")
        return f"part-{self.first_step:012d}-{self.last_step:012d}-{self.number:06d}{tags}.parquet"

    @classmethod
    def parse(cls, name: str) -> "PartName | None":
        """What a file's name says, or None for a name that is not a part file's."""
        match = _PART.fullmatch(name)
        if match is None:
            return None
        first, last, number, attempt, rank, merges = match.groups()
        return cls(int(first), int(last), int(number), int(attempt or 1), int(rank or 0), int(merges or 0))


def writer_tag(attempt: int, rank: int) -> str:
    """What a file's name says of who wrote it; nothing for the first attempt of rank 0."""
    return (f"a{attempt}" if attempt != 1 else "") + (f"r{rank}" if rank else "")


def part_name(first_step: int, last_step: int, number: int, attempt: int = 1, rank: int = 0) -> str:
    """Name of a part file that was not merged; see `PartName`."""
    return str(PartName(first_step, last_step, number, attempt, rank))


def part_steps(name: str) -> tuple[int, int] | None:
    """The step range in a part file's name, or None for a name that is not a part file's."""
    part = PartName.parse(name)
    return None if part is None else (part.first_step, part.last_step)


def metric_metadata() -> dict[str, dict[str, dict[str, str]]]:
    """Unit and meaning of every column, written into run.json so that a run explains itself."""
    return {
        table: {
            column.name: {"unit": column.unit, "meaning": column.meaning}
            for column in (*columns, *(STEP_SCALARS if table == "steps" else ()))
        }
        for table, columns in TABLES.items()
    }
