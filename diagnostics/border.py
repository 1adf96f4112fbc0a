"""The one border between this package and somebody's training: no fault of ours crosses it."""

import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec

from diagnostics.errors import RecorderWarning

P = ParamSpec("P")


@dataclass(frozen=True)
class Fault:
    """One fault of ours: where, what, and the traceback for a bug report."""

    where: str
    error: str
    trace: str


@dataclass
class Border:
    """Runs our code inside a training loop.

    A fault with a `culprit` (an attention site, say) is reported once for that culprit, whose code is not run
    again; a fault without one switches everything off through `on_fatal`.

    Attributes:
        on_fatal: called once everything is switched off.
        on_culprit: called once a culprit is out.
        owner: whose border it is, as the user knows it.
        promise: what is said of training where the owner switches itself off.
        faults: all that were met so far.
        broken: whether everything is switched off.
    """

    on_fatal: Callable[[Fault], None]
    on_culprit: Callable[[str, Fault], None] = lambda *_: None
    owner: str = "recorder"
    promise: str = "training goes on untouched"
    faults: list[Fault] = field(default_factory=list)
    broken: bool = False
    _noted: set[str] = field(default_factory=set)
    _out: set[str] = field(default_factory=set)
    _warned_fatal: bool = False

    def run(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Calls `function`; False where it failed or everything is switched off."""
        return self._contain(None, function, *args, **kwargs)

    def run_for(self, culprit: str, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> bool:
        """As `run`, but a fault takes only `culprit` out."""
        return self._contain(culprit, function, *args, **kwargs)

    def run_last(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> bool:
        """As `run`, but also after everything was switched off: to save what can still be saved."""
        return self._try(None, function, *args, **kwargs)

    def note(self, message: str) -> None:
        """Tells the user something once without switching anything off."""
        if message not in self._noted:
            self._noted.add(message)
            self._warn(message)

    def _contain(
        self, culprit: str | None, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs
    ) -> bool:
        if self.broken or culprit in self._out:
            return False
        return self._try(culprit, function, *args, **kwargs)

    def _try(
        self, culprit: str | None, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs
    ) -> bool:
        try:
            function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the border: whatever it is, training goes on
            self._report(culprit, error)
            return False
        return True

    def _report(self, culprit: str | None, error: Exception) -> None:
        where = culprit or self.owner
        fault = Fault(where, f"{type(error).__name__}: {error}", traceback.format_exc())
        self.faults.append(fault)
        if culprit is None:
            if not self._warned_fatal:
                self._warned_fatal = True
                self._warn(
                    f"the {self.owner} met a fault and switched itself off, {self.promise}: {fault.error}"
                )
            self.broken = True
            self.on_fatal(fault)
        else:
            self._out.add(culprit)
            self._warn(f"{culprit} is not observed any more, the rest goes on: {fault.error}")
            self.on_culprit(culprit, fault)

    @staticmethod
    def _warn(message: str) -> None:
        # Where the user turned warnings into errors, one raised here would stop the very training to be spared.
        # The filters themselves are the process's: to change them for a moment is not safe beside other threads.
        try:
            warnings.warn(message, RecorderWarning, stacklevel=5)
        except RecorderWarning:
            sys.stderr.write(f"RecorderWarning: {message}\n")
