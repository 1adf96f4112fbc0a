"""Work that no page waits for: one thread does it beside the server, newest request first. No streamlit here."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

# Who has closed the page needs no answer: what was not asked for again in this time is dropped.
_FORGOTTEN_AFTER_S = 30.0
# What changes all the time is done again only after so many times as long as it took.
_REPLAY_SHARE = 20.0


@dataclass(frozen=True)
class _Asked:
    stamp: Hashable
    job: Callable[[], Any]
    at_s: float


@dataclass(frozen=True)
class _Done:
    stamp: Hashable
    value: Any
    cost_s: float
    at_s: float


class Aside:
    """Does jobs one after the other, each once per stamp, and keeps the newest result of each key."""

    def __init__(self) -> None:
        self._asked: OrderedDict[Hashable, _Asked] = OrderedDict()
        self._done: dict[Hashable, _Done] = {}
        self._doing: Hashable = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self, key: Hashable, stamp: Hashable, job: Callable[[], Any]) -> None:
        """Has `job` done for `key`, unless that was done for this stamp, or lately at a cost worth sparing.

        Args:
            key: what the result is of.
            stamp: of the state that the job looks at.
            job: its value is kept; it handles its own errors.
        """
        with self._changed:
            done = self._done.get(key)
            now_s = time.monotonic()
            if done is not None and (done.stamp == stamp or now_s < done.at_s + _REPLAY_SHARE * done.cost_s):
                return
            working = self._thread is not None and self._thread.is_alive()
            if working and self._doing == key:
                return
            self._asked[key] = _Asked(stamp, job, now_s)
            self._asked.move_to_end(key)
            if not working:
                # Daemon: a server that is told to end does not finish what nobody will see.
                self._thread = threading.Thread(target=self._work, name="dashboard-aside", daemon=True)
                self._thread.start()

    def result(self, key: Hashable) -> Any:  # noqa: ANN401 - whatever the job gave
        """The newest value of a key, of whatever stamp; None as long as there is none."""
        done = self._done.get(key)
        return None if done is None else done.value

    def wait(self, timeout_s: float) -> None:
        """Returns when nothing is left to do, or after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._asked and self._doing is None, timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._doing = None
                self._forget()
                self._changed.notify_all()
                if not self._asked:
                    self._thread = None
                    return
                key, asked = self._asked.popitem()
                self._doing = key
            begun_s = time.monotonic()
            value = asked.job()
            now_s = time.monotonic()
            with self._changed:
                self._done[key] = _Done(asked.stamp, value, now_s - begun_s, now_s)

    def _forget(self) -> None:
        oldest_s = time.monotonic() - _FORGOTTEN_AFTER_S
        for key in [key for key, asked in self._asked.items() if asked.at_s < oldest_s]:
            del self._asked[key]


ASIDE = Aside()
