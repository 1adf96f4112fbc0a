"""What a run directory holds before a recorder claims it, and whether it may be claimed."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from diagnostics.errors import DiagnosticsError, NotARunError, RunExistsError
from diagnostics.store.format import HEARTBEAT_LOST_S, MANIFEST
from diagnostics.store.manifest import Manifest, live_state, may_be_written, parse_manifest
from diagnostics.store.migrate import migrate
from diagnostics.store.names import DAMAGED_SUFFIX, holds_rows

# Releases before this schema version recorded without a lock.
_FIRST_LOCKED = 2


@dataclass(frozen=True)
class Previous:
    """The run.json found in a directory.

    Attributes:
        run_dir: the directory, which need not exist.
        content: the file's; None where there is none.
        manifest: what it says, of the current schema version; None where it says nothing.
        damage: why it cannot be read; None where it can, or is not there.
        locked: whether whoever wrote it recorded with a lock.
    """

    run_dir: Path
    content: bytes | None
    manifest: Manifest | None
    damage: str | None
    locked: bool

    @classmethod
    def found_in(cls, run_dir: Path) -> Self:
        """Reads run.json.

        Raises:
            NewerSchemaError: a newer release wrote it.
            OSError: it may not be read.
        """
        path = run_dir / MANIFEST
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return cls(run_dir, None, None, None, locked=True)
        try:
            written = parse_manifest(content, path)
        except NotARunError as error:
            return cls(run_dir, content, None, str(error), locked=True)
        return cls(
            run_dir, content, migrate(written), None, locked=written["schema_version"] >= _FIRST_LOCKED
        )

    def check(self, *, lock_decides: bool, rank: int = 0) -> None:
        """Refuses a directory that is not to be written to.

        Args:
            lock_decides: whether the lock says if a process of this host records.
            rank: who asks. run.json tells of rank 0 alone: beside it, on whatever host, another rank may record.

        Raises:
            RunExistsError: a process seems to record into it.
            DiagnosticsError: its run.json is somebody else's.
        """
        if self.manifest is not None:
            if not rank and may_be_written(self.manifest, lock_decides=lock_decides and self.locked):
                raise self._refusal(self.manifest)
        elif self.content and not holds_rows(self.run_dir):
            raise DiagnosticsError(
                f"{self.damage}. There are no tables beside it, so it may not be a recorder's: move it away, or give "
                "another run_dir"
            )

    def end_state(self) -> str:
        """The state that the run before ended in, once it is known that nobody records it."""
        state = "running" if self.manifest is None else str(self.manifest.get("state"))
        return "finished" if state == "finished" else "crashed"

    def put_damaged_aside(self) -> Path | None:
        """Gives a damaged run.json another name, which is returned; None where there is nothing to keep."""
        if self.damage is None or not self.content:
            return None
        kept = self.run_dir / f"{MANIFEST}{DAMAGED_SUFFIX}"
        count = 1
        while kept.exists():
            count += 1
            kept = self.run_dir / f"{MANIFEST}{DAMAGED_SUFFIX}-{count}"
        (self.run_dir / MANIFEST).rename(kept)
        return kept

    def _refusal(self, manifest: Manifest) -> RunExistsError:
        age_s = max(0.0, time.time() - float(manifest.get("heartbeat_s") or 0.0))
        return RunExistsError(
            f"{self.run_dir} is being recorded by process {manifest.get('pid')} on {manifest.get('host')} "
            f"({live_state(manifest)}, last sign of life {age_s:.0f} s ago); end that process, or give another "
            f"run_dir (None makes a new one). A process that died on another host counts as alive for "
            f"{HEARTBEAT_LOST_S:.0f} s"
        )
