"""`Mirror`: keeps a run behind a URI the same as the local directory that a recorder writes, its spool.

It works on a thread of its own and compares listings, so that it can begin from any state: a resume, a crash,
a part of the files uploaded. Nothing waits for it but `close`, and that for a bounded time.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from diagnostics.store.names import tail_in
from diagnostics.store.remote.folder import FAILURES, Remote, reason_of
from diagnostics.store.remote.upload import Uploader

_LOOK_EVERY_S = 1.0
_LONGEST_PAUSE_S = 60.0
_CLOSE_S = 30.0


class Mirror:
    """Uploads a spool while it is written, on a daemon thread.

    Where the store cannot be reached it tries again after longer and longer pauses, up to a minute.

    Args:
        spool: the run directory.
        remote: where it goes.
        rank: whose parts it uploads; only rank 0 uploads run.json.
        contained: runs a callable so that our own faults go to the recorder's border; False where it failed.
        tell: called with a sentence, once, when something keeps the run from its URI.
    """

    def __init__(
        self,
        spool: Path,
        remote: Remote,
        *,
        rank: int = 0,
        contained: Callable[[Callable[[], None]], bool],
        tell: Callable[[str], None],
    ) -> None:
        self._spool = spool
        self._remote = remote
        self._rank = rank
        self._uploader = Uploader(spool, remote, rank)
        self._contained = contained
        self._tell = tell
        self._told = False
        self._failures = 0
        self._trouble = "there was not enough time"
        self._ending = False
        self._complete = False
        self._wake = threading.Event()
        # Daemon: a process that ends without close() must be able to exit.
        self._thread = threading.Thread(target=self._run, name="diagnostics-mirror", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = _CLOSE_S) -> str | None:
        """Uploads what is left and clears the spool; to be called when nothing more is written there.

        Args:
            timeout_s: seconds after which it gives up.

        Returns:
            What is to be said to the user where not everything could be uploaded in time; None where all is up.
        """
        self._ending = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._uploader.stopped = True
        self._wake.set()
        if self._complete:
            return None
        return (
            f"{self._remote.uri} is not complete, {self._trouble}: the rest, {self._uploader.left()} part files and what run.json "
            f"says last, is in {self._spool}; `diagnostics compact {self._remote.uri}` on this machine uploads it"
        )

    def _run(self) -> None:
        while self._contained(self._pass) and not self._uploader.stopped:
            pause_s = min(_LONGEST_PAUSE_S, _LOOK_EVERY_S * 2.0 ** min(self._failures, 6))
            self._wake.wait(_LOOK_EVERY_S if self._ending else pause_s)
            self._wake.clear()

    def _pass(self) -> None:
        ending = self._ending
        try:
            done = self._uploader.run(last=ending)
        except FAILURES as error:
            if self._uploader.stopped:
                return  # close() has given up and said so; at exit the store's client is taken down under us
            self._failures += 1
            self._trouble = f"it cannot be written ({reason_of(error)})"
            self._say(
                f"{self._remote.uri} cannot be written ({reason_of(error)}); training and recording go on, the run is kept "
                f"in {self._spool} and uploaded as soon as that works again"
            )
            return
        self._failures = 0
        if self._uploader.displaced:
            self._uploader.stopped = True
            self._trouble = f"as {self._uploader.displaced} recorded another run there meanwhile"
            self._say(f"nothing more is uploaded to {self._remote.uri}, {self._trouble}: see {self._spool}")
        elif ending and done:
            # What could not be made into part files, as the disk was full, say, is in the tail.
            if any(name.rank == self._rank for name in tail_in(self._spool)):
                self._trouble = "as not all rows could be made into part files"
            else:
                self._uploader.clear_spool()
                self._complete = True
            self._uploader.stopped = True

    def _say(self, sentence: str) -> None:
        if not self._told:
            self._told = True
            self._tell(sentence)
