"""What the figures depend on, as one hash: `--check` can then tell stale figures from fresh ones in a second."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    ("diagnostics/detect", "*.py"),
    ("diagnostics/detect", "*.json"),
    ("sample_runs/corpus/tables", "*.npz"),
    ("sample_runs/evaluate", "*.py"),
)


def inputs_hash(root: Path = ROOT) -> str:
    """SHA-256 over names and contents of all tables, detectors, bands and of this package."""
    total = hashlib.sha256()
    for path in inputs(root):
        total.update(path.relative_to(root).as_posix().encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def inputs(root: Path = ROOT) -> Iterator[Path]:
    """The files, in a fixed order."""
    for folder, pattern in SOURCES:
        yield from sorted((root / folder).glob(pattern))
