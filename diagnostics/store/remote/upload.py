"""`Uploader`: brings what is new in a run directory, a spool, to the run's URI. `upload_all`: brings everything."""

import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import CONTROL_JOURNAL, MANIFEST
from diagnostics.store.manifest import Manifest, read_manifest
from diagnostics.store.parts.merged import replaced_by
from diagnostics.store.remote.folder import FAILURES, Remote, reason_of
from diagnostics.store.remote.outbox import Upload, folder_times, part_of, parts_of, waiting, write_retold

_MANIFEST_EVERY_S = 5.0
_PATIENCE_S = 60.0
_TRY_AGAIN_S = 2.0


class Uploader:
    """One pass at a time; what a pass could not do is left to the next.

    Args:
        spool: the run directory.
        remote: where it goes.
        rank: whose parts; run.json and the commands' journal go with rank 0's.
    """

    def __init__(self, spool: Path, remote: Remote, rank: int = 0) -> None:
        self._spool = spool
        self._remote = remote
        self._rank = rank
        self._up: dict[str, int] = {}
        self._looked = False
        self._seen: dict[str, int] | None = None
        self._told: dict[str, frozenset[str]] = {}
        self._facts: tuple[bytes, int] | None = None
        self._facts_at_s = 0.0
        self.stopped = False
        """Set from any thread: nothing more is begun."""
        self.displaced: str | None = None
        """Who records to the URI by now, where that is another."""

    def run(self, *, last: bool = False) -> bool:
        """Uploads what is new; False where not everything is up.

        Args:
            last: nothing more will come: run.json goes however recently it went, and the last word with it.

        Raises:
            OSError, pyarrow.ArrowException: the store cannot be reached; the next pass looks anew at what is up.
        """
        try:
            return self._run(last=last)
        except FAILURES:
            self._looked = False
            raise

    def left(self) -> int:
        """How many parts are in the spool and not up, as far as is known."""
        return sum(self._up.get(name) != size for name, size in parts_of(self._spool, self._rank).items())

    def clear_spool(self) -> None:
        """Removes the parts that are up; at any moment the parts that are left hold what they replace."""
        for name in sorted(parts_of(self._spool, self._rank), key=lambda name: -part_of(name).merges):
            if name in self._up:
                (self._spool / name).unlink(missing_ok=True)

    def _run(self, *, last: bool) -> bool:
        if not self._looked:
            self._up, self._seen = self._remote.sizes(), None
            self._compare(read_manifest(self._spool) if self._rank == 0 else {})
            if self.displaced:
                return False
            self._looked = True
        stamps = folder_times(self._spool)
        if stamps != self._seen or last:
            self._seen = None
            local = parts_of(self._spool, self._rank)
            missed = False
            for upload in waiting(local, self._up, self._told_by):
                # A long backlog must not let the run look dead.
                self._bring_facts(last=False, midway=True)
                if self.stopped or self.displaced:
                    return False
                missed |= not self._bring(upload, local[upload.name])
            self._told = {name: names for name, names in self._told.items() if name in local}
            if missed:
                return False
            self._seen = stamps
        self._bring_facts(last=last)
        return not (self.stopped or self.displaced)

    def _told_by(self, name: str) -> frozenset[str]:
        if name not in self._told:
            self._told[name] = replaced_by(self._spool / name)
        return self._told[name]

    def _bring(self, upload: Upload, size: int) -> bool:
        """False where the part was merged into another one meanwhile."""
        source = self._spool / upload.name
        try:
            if upload.untold:
                with tempfile.NamedTemporaryFile() as copy:
                    write_retold(source, upload.untold, copy.file)
                    copy.flush()
                    self._remote.put_file(Path(copy.name), upload.name)
            elif not upload.is_up:
                self._remote.put_file(source, upload.name)
        except FileNotFoundError:
            if source.exists():
                raise
            return False
        self._up[upload.name] = size
        for name in sorted(upload.replaces):
            # Where nothing may be removed it stays, left out by readers as the merged part names it.
            with suppress(*FAILURES):
                self._remote.remove(name)
            del self._up[name]
        return True

    def _bring_facts(self, *, last: bool, midway: bool = False) -> None:
        """Brings run.json and the commands' journal, where they are due."""
        now_s = time.monotonic()
        if self._rank or (self._facts_at_s and not last and now_s - self._facts_at_s < _MANIFEST_EVERY_S):
            return
        content = (self._spool / MANIFEST).read_bytes()
        journal = self._spool / CONTROL_JOURNAL
        facts = content, journal.stat().st_size if journal.exists() else 0
        if facts == self._facts:
            return
        own = read_manifest(self._spool)
        if midway and own.get("state") != "running":
            return  # how the run ended is told when all of it is there
        there = self._compare(own)
        if self.displaced:
            return
        if facts[1] != (self._facts or (b"", 0))[1]:
            self._remote.put_file(journal, CONTROL_JOURNAL.as_posix())
        # A machine that was cut off must not speak for the attempt that another one has begun since.
        if int(there.get("attempt") or 1) <= int(own.get("attempt") or 1):
            self._remote.put(content, MANIFEST)
        self._facts, self._facts_at_s = facts, now_s

    def _compare(self, own: Manifest) -> Manifest:
        """The run.json at the URI, {} where there is none; sees whether it is another run's."""
        there = _manifest_at(self._remote)
        if own and there and there.get("run_id") != own.get("run_id"):
            self.displaced = f"process {there.get('pid')} on {there.get('host')}"
        return there


def upload_all(spool: Path, remote: Remote, rank: int) -> None:
    """Uploads everything of a rank that no process records, and clears it from the spool.

    Raises:
        DiagnosticsError: the store cannot be reached, or another run is there by now.
    """
    uploader = Uploader(spool, remote, rank)
    until_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            if uploader.run(last=True):
                uploader.clear_spool()
                return
        except FAILURES as error:
            if time.monotonic() > until_s:
                raise DiagnosticsError(
                    f"{remote.uri} cannot be written ({reason_of(error)}); the run is still in {spool}: try again later"
                ) from error
            time.sleep(_TRY_AGAIN_S)
        if uploader.displaced:
            raise DiagnosticsError(
                f"{remote.uri} holds another run by now, recorded by {uploader.displaced}; this one is kept in {spool}: "
                "copy that folder to a URI of its own"
            )


def _manifest_at(remote: Remote) -> Manifest:
    """A run.json that cannot be understood is no reason not to replace it."""
    try:
        manifest = json.loads(remote.read(MANIFEST) or b"null")
    except ValueError:
        return {}
    return manifest if isinstance(manifest, dict) else {}
