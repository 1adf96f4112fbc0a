"""Telling the user which attention is observed: a table in the log, and loudly what is found but not observed."""

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diagnostics.attach.site import Site, Sites

_LOG = logging.getLogger("diagnostics")
_LOOKS = 2
"""Measured steps with attention after which a site that none of them called is told: one may skip a layer by chance."""
_NAMED = 5
_BLIND = (
    "no attention call was observed in the first measured step: entropy and spectra are not recorded. Either no "
    "training forward of the attached model ran (attach to the module you call), or it ran without gradients "
    "(activation checkpointing with use_reentrant=True does so; use_reentrant=False is observed), or its "
    "attention is of a kind that this version cannot see"
)

Announce = Callable[[str, str, str, Mapping[str, Any]], None]


class SiteReport:
    """Says each thing once; quiet where all is as it was.

    Args:
        attached: the model, in a word.
        note: warns the user once.
        announce: writes an event: kind, severity, message, data.
    """

    def __init__(self, attached: str, note: Callable[[str], None], announce: Announce) -> None:
        self._attached = attached
        self._note = note
        self._announce = announce
        self._shown = ""
        self._looks = 0
        self._checked_for_blindness = False
        self._uncalled: set[str] = set()
        self._told: set[tuple[str, str]] = set()

    def show(self, sites: Sites) -> None:
        """Prints the table on stderr where it differs from the last one; through logging where that is set up."""
        table = site_table(sites)
        if table == self._shown:
            return
        self._shown = table
        message = f"{self._attached}: {len(sites)} attention sites\n{table}"
        if _LOG.hasHandlers():
            _LOG.info(message)
        else:
            print(f"diagnostics: {message}", file=sys.stderr)

    def after_measured(
        self, step: int, sites: Sites, *, called: bool, uncalled: Iterable[str], faulty: bool
    ) -> None:
        """Says what a measured step has shown.

        Args:
            step: its number.
            sites: as known after it.
            called: whether any attention was called in it.
            uncalled: candidates that it left uncalled.
            faulty: whether a fault was reported already, which explains everything.
        """
        if not called:
            if not (faulty or self._checked_for_blindness):
                self._note(_BLIND)
                self._announce("warning", "warning", _BLIND, {"step": step})
            self._checked_for_blindness = True
            return
        self._checked_for_blindness = True
        self.show(sites)
        self._uncalled |= set(uncalled)
        self._looks += 1
        if self._looks >= _LOOKS:
            never = sorted(name for name in self._uncalled if name in sites.skipped)
            self._uncalled.clear()
            self._tell(
                step,
                "found by name, but never called in a training forward, so nothing is recorded of",
                never,
            )
        for site in sites:
            if site.reason:
                self._tell(step, f"called, but there are no spectra ({site.reason}) of", [site.name])

    def _tell(self, step: int, what: str, names: list[str]) -> None:
        new = [name for name in names if (what, name) not in self._told]
        if not new:
            return
        self._told |= {(what, name) for name in new}
        listed = ", ".join(name or "(model)" for name in new[:_NAMED])
        more = f" and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
        message = f"{what} {listed}{more}"
        _LOG.warning("%s: %s", self._attached, message)
        self._announce("warning", "warning", message, {"step": step, "sites": new})


def site_table(sites: Sites) -> str:
    """One line for each kind of site: layers that differ in a number of their name only share it."""
    kinds: dict[tuple[str, str], list[str]] = {}
    entries = [(site.name, _described(site)) for site in sites]
    entries += [(name, f"skipped, {reason}") for name, reason in sites.skipped.items()]
    for name, text in entries:
        kinds.setdefault((re.sub(r"\d+", "*", name), text), []).append(name or "(model)")
    lines = [f"  {_together(names)}: {text}" for (_, text), names in kinds.items()]
    return "\n".join(lines) or "  none found by name; attention is looked for in the first measured step"


def _described(site: Site) -> str:
    known = [
        f"{'?' if site.heads is None else site.heads} heads",
        f"{'?' if site.kv_heads is None else site.kv_heads} key heads",
        f"size {'?' if site.head_dim is None else site.head_dim}",
        "scale of each call" if site.scale is None else f"scale {site.scale:g}",
        site.layout + ("" if site.verified == "no" else f" (verified by {site.verified})"),
        *site.flags,
    ]
    return ", ".join(known) + (f"; no spectra: {site.reason}" if site.reason else "")


def _together(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
