"""Claiming a run directory: a new one, or one whose run nobody records now, for another attempt at it."""

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from diagnostics.attach.site import Sites
from diagnostics.errors import DiagnosticsError, RunExistsError
from diagnostics.record.previous import Previous
from diagnostics.record.ranks import Rank
from diagnostics.store.format import MANIFEST, SCHEMA_VERSION, TABLES, TAIL, PartName, metric_metadata
from diagnostics.store.lock import Lock, hold
from diagnostics.store.manifest import (
    Manifest,
    attempt_number,
    attempts_of,
    begin_attempt,
    live_state,
    remove_stale_temporaries,
    write_atomically,
    write_manifest,
)
from diagnostics.store.migrate import OF_AN_ATTEMPT
from diagnostics.store.names import Used, parts_in, tail_in, used_names
from diagnostics.store.place import is_uri, place
from diagnostics.store.plain import plain
from diagnostics.store.remote.spool import Spool, open_spool
from diagnostics.store.tail.name import TailName
from diagnostics.store.tail.settle import settle
from diagnostics.version import __version__

# What the claim or the first measured step of an attempt says anew.
_OF_AN_ATTEMPT = ("remedies", "updates_left_out", "attention_observed", "uri", "spool")


@dataclass
class Claim:
    """A run directory that this process alone records into, as this rank.

    Attributes:
        run_dir: the directory; its table folders are there.
        manifest: what run.json says; that of another rank than 0 is for itself and never written.
        attempt: which attempt at the run this is, counted from 1.
        rank: rank of this process in its job.
        number: for the first flush; no file of this rank carries it yet.
        lock: held until `release`.
        told: what the user should know, in sentences.
        warned: what the user should be warned of.
        replaced: run.json as it was before.
        spool: where `run_dir` is to be uploaded; None for a local run.
    """

    run_dir: Path
    manifest: Manifest
    attempt: int
    rank: int
    number: int
    lock: Lock
    told: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    replaced: str | None = None
    spool: Spool | None = None

    def release(self) -> None:
        """Lets another recorder claim the directory; idempotent, and without effect in a forked child."""
        self.lock.release()

    @contextmanager
    def kept_if_it_works(self) -> Iterator[ExitStack]:
        """Around what may fail before a recorder is there: then it is undone, with what was put on the stack since."""
        with ExitStack() as undo:
            undo.callback(self._give_back)
            yield undo
            undo.pop_all()

    def _give_back(self) -> None:
        # A disk that refuses this too keeps the traces; the error that led here is what the user should see.
        with suppress(OSError):
            self._clear_up()
        self.lock.release()

    def _wrote(self, name: PartName | TailName) -> bool:
        return (name.attempt, name.rank) == (self.attempt, self.rank)

    def _clear_up(self) -> None:
        # No step was recorded; at most events of the start.
        own = [self.run_dir / TAIL / str(name) for name in tail_in(self.run_dir) if self._wrote(name)]
        for table in TABLES:
            written = parts_in(self.run_dir / table)
            own += [self.run_dir / table / str(name) for name in written if self._wrote(name)]
        for path in own:
            path.unlink()
        if self.rank:
            return
        if self.replaced is not None:
            write_atomically(self.run_dir / MANIFEST, self.replaced)
            return
        (self.run_dir / MANIFEST).unlink()
        self.lock.path.unlink()
        for folder in (*TABLES, TAIL, "control/inbox", "control", "."):
            with suppress(OSError):  # it was there before and holds something
                (self.run_dir / folder).rmdir()


def claim_run_dir(
    run_dir: str | os.PathLike[str] | None,
    *,
    model: nn.Module,
    config: Mapping[str, Any] | None,
    every: int,
    control: str,
    sites: Sites,
    rank: Rank | None = None,
) -> Claim:
    """Makes the run directory, or begins another attempt at the run in it.

    Raises:
        RunExistsError: another process records into the directory, or this one does already.
        NewerSchemaError: it holds a run of a newer release.
        DiagnosticsError: the directory cannot be made or written.
    """
    started_s = time.time()
    number = 0 if rank is None else rank.number
    identity = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(started_s))}-{secrets.token_hex(3)}"
    where = _place(run_dir, identity, number)
    spool = where if isinstance(where, Spool) else None
    path = where.run_dir if isinstance(where, Spool) else where
    new: Manifest = {
        "schema_version": SCHEMA_VERSION,
        "run_id": identity,
        "started_s": started_s,
        "last_step_s": None,
        "steps": 0,
        "status": "no-data",
        "overhead": 0.0,
    }
    own: Manifest = {
        "every": every,
        "control": control,
        "config": plain(config or {}),
        "model": {
            "class": type(model).__name__,
            # A lazy module's parameters have no size before its first forward.
            "parameters": sum(
                parameter.numel() for parameter in model.parameters() if not is_lazy(parameter)
            ),
        },
        "sites": [site.to_dict() for site in sites],
        "skipped": dict(sites.skipped),
        "versions": {"training-diagnostics": __version__, "torch": str(torch.__version__)},
        "metrics": metric_metadata(),
    }
    if spool is not None:
        own |= {"uri": spool.remote.uri, "spool": str(path)}
    try:
        # What cannot be is refused before anything is made.
        Previous.found_in(path).check(lock_decides=True, rank=number)
        path.mkdir(parents=True, exist_ok=True)
        lock = hold(path, number)
        with ExitStack() as undo:
            undo.callback(lock.release)
            claim = _claim(path, number, lock, new, own, started_s, spool)
            undo.pop_all()
    except OSError as error:
        raise DiagnosticsError(
            f"{path} cannot be written ({error}); give a run_dir that you may write to"
        ) from error
    return claim


def _place(run_dir: str | os.PathLike[str] | None, identity: str, rank: int) -> Path | Spool:
    if run_dir is None and rank:
        raise DiagnosticsError(
            f"run_dir is None on rank {rank}, which DIAGNOSTICS_RANKS asks to record: the ranks of a job must be given "
            "one path, since each would make a directory of its own"
        )
    if run_dir is not None and not (isinstance(run_dir, str | os.PathLike) and os.fspath(run_dir)):
        raise DiagnosticsError(f"run_dir is {run_dir!r}; give a path, or None for runs/<timestamp>-<id>")
    text = os.fspath(run_dir) if run_dir is not None else os.path.join("runs", identity)  # noqa: PTH118 - may be a URI
    if not is_uri(text):
        return Path(text)
    return place(text).local or open_spool(text, rank)  # file:// is a path of this machine


def _claim(
    path: Path,
    rank: int,
    lock: Lock,
    new: Manifest,
    own: Manifest,
    started_s: float,
    spool: Spool | None,
) -> Claim:
    """The claim of a directory whose lock is held."""
    previous = Previous.found_in(path)
    previous.check(lock_decides=lock.of_kernel, rank=rank)
    for table in TABLES:
        (path / table).mkdir(exist_ok=True)
    settled = settle(path, rank)
    used = used_names(path, rank)
    noted = lock.last.get("attempt")
    last = max([noted if isinstance(noted, int) else 0, *used.attempts])
    number = 1 + max(used.number, -1 if spool is None else spool.used_number)
    claim = Claim(path, {**new, **own}, 1, rank, number, lock, spool=spool)
    claim.warned += [
        f"{path / name} holds rows that could not be read ({why}); it is kept, all else of it is in part files"
        for name, why in settled.damaged.items()
    ]
    if rank:
        there = previous.manifest if spool is None else spool.there
        claim.attempt = max(last + 1, _attempt_of_rank_0(there))
        begin_attempt(claim.manifest, claim.attempt, before="", started_s=started_s)
    else:
        _carry_on(claim, previous, own, used, last)
        begin_attempt(claim.manifest, claim.attempt, before=previous.end_state(), started_s=started_s)
        remove_stale_temporaries(path / MANIFEST)
        write_manifest(path, claim.manifest)
    lock.note(attempt=claim.attempt)
    return claim


def _carry_on(claim: Claim, previous: Previous, own: Manifest, used: Used, last: int) -> None:
    """Takes over what is known of the run before, where there is one."""
    run_dir, state = claim.run_dir, previous.end_state()
    if previous.manifest is not None:
        claim.replaced = (previous.content or b"").decode()
        kept = {key: value for key, value in previous.manifest.items() if key not in _OF_AN_ATTEMPT}
        claim.manifest = {**kept, **own}
        claim.attempt = 1 + max(last, attempt_number(kept))
    elif used.attempts:
        aside = previous.put_damaged_aside()
        claim.warned.append(
            f"{run_dir / MANIFEST} "
            + ("is missing" if aside is None else f"is damaged and kept as {aside.name} ({previous.damage})")
            + "; the tables beside it are kept, config and times of the run before are not known"
        )
        claim.manifest |= {
            "started_s": None,
            "attempts": [_known_by_name(attempt) for attempt in sorted(used.attempts)],
        }
        claim.attempt = 1 + last
    elif previous.content is None and not claim.lock.of_kernel:
        _take_without_lock(run_dir)
    if claim.attempt == 1:
        return
    _fill_first_steps(claim)
    # run.json was written some seconds before the end.
    ends = [(part.attempt, part.last_step) for part in parts_in(run_dir / "steps", claim.rank)]
    if ends:
        claim.manifest["steps"] = max(ends)[1] + 1
    claim.told.append(
        f"{run_dir} holds a run of {claim.manifest['steps']} steps ({state}): recording attempt {claim.attempt} into "
        "it; steps recorded again replace the old ones for readers, both stay on disk"
    )


def _known_by_name(attempt: int) -> Manifest:
    """An attempt of which only its files tell."""
    return {"attempt": attempt, "first_step": None, **dict.fromkeys(OF_AN_ATTEMPT), "state": "crashed"}


def _fill_first_steps(claim: Claim) -> None:
    """Of attempts that died before run.json could tell with which step they began."""
    parts = parts_in(claim.run_dir / "steps", claim.rank)
    for told in attempts_of(claim.manifest):
        if told.get("first_step") is None:
            firsts = [part.first_step for part in parts if part.attempt == told.get("attempt")]
            told["first_step"] = min(firsts, default=None)


def _take_without_lock(run_dir: Path) -> None:
    """Of two processes that start at once on a file system without locks, one gets the directory."""
    try:
        (run_dir / MANIFEST).open("x").close()
    except FileExistsError:
        raise RunExistsError(f"{run_dir} was just taken by another process; give another run_dir") from None


def _attempt_of_rank_0(manifest: Manifest | None) -> int:
    """Which attempt rank 0 makes of it, or will have made once it has claimed the directory."""
    if manifest is None:
        return 1
    begun = live_state(manifest) in ("running", "stalled")
    return attempt_number(manifest) + (0 if begun else 1)
