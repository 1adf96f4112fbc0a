"""What joins a recorder to the mirror of its run directory, where its run_dir is a URI."""

from collections.abc import Callable
from pathlib import Path

from diagnostics.border import Border, Fault
from diagnostics.record.claim import Claim
from diagnostics.record.stream import Stream
from diagnostics.store.remote.mirror import Mirror


class Uploading:
    """The upload of one recorder's run; for a local run nothing.

    Args:
        claim: the run directory, and where it is to be uploaded.
        stream: notes in run.json what went wrong.
        note: tells the user.
    """

    def __init__(self, claim: Claim, stream: Stream, note: Callable[[str], None]) -> None:
        self.run_dir: Path | str = claim.run_dir
        """Where readers find the run."""
        self._stream = stream
        self._note = note
        self._mirror: Mirror | None = None
        if claim.spool is None:
            return
        self.run_dir = claim.spool.remote.uri
        self._where = f"the upload to {self.run_dir}"
        border = Border(
            self._record,
            owner=f"upload to {self.run_dir}",
            promise=f"training and recording go on in {claim.run_dir}",
        )
        self._mirror = Mirror(
            claim.run_dir, claim.spool.remote, rank=claim.rank, contained=border.run, tell=self._tell
        )

    def finish(self) -> None:
        """Uploads what is left, for a bounded time; says what could not be."""
        left = None if self._mirror is None else self._mirror.close()
        if left is not None:
            self._note(left)

    def _tell(self, sentence: str) -> None:
        self._note(sentence)
        self._stream.record_fault(self._where, sentence, "")

    def _record(self, fault: Fault) -> None:
        self._stream.record_fault(fault.where, fault.error, fault.trace)
