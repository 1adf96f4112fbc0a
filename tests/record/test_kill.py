"""A recording process that dies at any instant leaves a run that shows every step it had acknowledged, once."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from dying import (
    CALM,
    MEASURED,
    Ack,
    Death,
    Nursery,
    Reference,
    by_step,
    check_coarse,
    check_events,
    check_measured,
    check_run,
    check_steps,
    opened,
    promised,
    promised_measurements,
)

from diagnostics.errors import NotARunError
from diagnostics.store.compact import compact_run
from diagnostics.store.format import MANIFEST
from diagnostics.store.read import Run, open_run
from diagnostics.store.tail.settle import settle

# Where in a run processes die differs from run to run of this test anyhow; the seed says how they were chosen.
SEED = int(os.environ.get("KILL_SEED", "4"))
KILLS = int(os.environ.get("KILLS", "200"))
_EVERY = 4
_LONGEST = 120


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def reference(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The same training, left alone."""
    root = tmp_path_factory.mktemp("reference")
    death = nursery.record(root / "run", root / "acks", steps=_LONGEST, every=_EVERY, cadence=CALM)
    assert death.code == 0, death.words
    assert death.steps == list(range(_LONGEST))
    reference = Reference.of(open_run(root / "run"))
    assert all(sorted(rows) == list(range(0, _LONGEST, _EVERY)) for rows in reference.rows.values())
    return reference


def check_dead(run_dir: Path, acks: list[Ack], reference: Reference, *, closed: bool = False) -> None:
    """What the dead run shows: as it lies there, once it is settled, and once it is compacted."""
    if not (run_dir / MANIFEST).exists():
        assert not acks, "steps were acknowledged before the run had a manifest"
        with pytest.raises(NotARunError):
            open_run(run_dir)
        return
    check_run(opened(run_dir), acks, reference, every=_EVERY, closed=closed)
    settle(run_dir)
    check_run(opened(run_dir), acks, reference, every=_EVERY, closed=closed)
    compact_run(run_dir)
    run = opened(run_dir)
    check_run(run, acks, reference, every=_EVERY, closed=closed)
    check_coarse(run, 16)


def test_every_acknowledged_step_is_read_once_after_a_kill_at_any_instant(
    nursery: Nursery, reference: Reference, tmp_path: Path
) -> None:
    chance = random.Random(SEED)  # noqa: S311 - no secret
    print(f"KILL_SEED={SEED} KILLS={KILLS}")
    dead: tuple[Path, Death] | None = None
    for number in range(KILLS + 1):
        run_dir = tmp_path / f"run-{number}"
        if number < KILLS:
            # One in eight dies while its directory is claimed, the others after some steps.
            early = chance.random() < 0.125
            kill = {
                "signal": "SIGKILL",
                "after_acks": 0 if early else chance.randrange(24),
                "delay_s": chance.uniform(0.0, 0.12) if early else chance.uniform(0.0, 0.012),
            }
            nursery.send(run_dir, tmp_path / f"acks-{number}", kill=kill, every=_EVERY, steps=_LONGEST)
        if dead is not None:
            check_dead(dead[0], dead[1].acks, reference)
            shutil.rmtree(dead[0], ignore_errors=True)
        if number < KILLS:
            death = nursery.receive()
            assert death.signal == signal.SIGKILL, death.words
            dead = run_dir, death


# --- read while it is written -----------------------------------------------------------------------------


def test_a_reader_beside_a_recording_process_sees_every_acknowledged_step_once_at_any_time(
    nursery: Nursery, reference: Reference, tmp_path: Path
) -> None:
    run_dir, acks = tmp_path / "run", tmp_path / "acks"
    kill = {"signal": "SIGKILL", "after_acks": _LONGEST - 20, "delay_s": 0.0}
    nursery.send(run_dir, acks, kill=kill, every=_EVERY, steps=_LONGEST)
    while not promised(acks):
        time.sleep(0.001)
    run = open_run(run_dir)
    cursors = {table: run.follow(table) for table in ("steps", *MEASURED)}
    followed: dict[str, list[dict[str, Any]]] = {table: [] for table in cursors}
    reads = 0
    while len(before := promised(acks)) < _LONGEST - 20:
        seen = opened_live(run_dir)
        after = promised(acks)
        steps = seen["steps"]
        assert len(before) <= len(steps) <= len(after) + 1, f"{len(before)} before, {len(steps)} seen"
        check_steps(pa.Table.from_pylist(steps[: len(before)]), before, every=_EVERY)
        assert [row["step"] for row in steps] == list(range(len(steps)))
        for table, cursor in cursors.items():
            due = [ack.step for ack in promised(acks)]
            news = cursor.read()
            assert news.replaces_from is None
            followed[table] += news.rows.to_pylist()
            taken = [row["step"] for row in followed[table]]
            if table == "steps":
                assert taken == list(range(len(taken)))
                assert len(taken) >= len(due)
            else:
                assert set(taken) >= {step for step in due if step % _EVERY == 0 and step + _EVERY in due}
                by_step(pa.Table.from_pylist(followed[table]), MEASURED[table])
        reads += 1
    death = nursery.receive()
    print(f"{reads} reads")
    check_dead(run_dir, death.acks, reference)
    assert reads > 3


def opened_live(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    run = open_run(run_dir)
    tables = {table: run.table(table).to_pylist() for table in ("steps", *MEASURED)}
    assert run.damaged == {}
    return tables


# --- deaths at each kind of file operation ----------------------------------------------------------------


def moments(seen: dict[str, int], chance: random.Random) -> list[tuple[str, int]]:
    """Everything done to each kind of file, once at any time; what takes or gives a name the first and last time."""
    found = []
    for key, count in sorted(seen.items()):
        times = {chance.randint(1, count)}
        if key.startswith(("os.rename", "os.remove")):
            times = {1, count}
        found += [(key, time) for time in sorted(times)]
    return found


def test_a_death_at_any_kind_of_file_operation_costs_no_acknowledged_row(
    nursery: Nursery, reference: Reference, tmp_path: Path
) -> None:
    steps = 24
    whole = nursery.record(tmp_path / "whole", tmp_path / "acks", steps=steps, ops=True)
    assert whole.code == 0, whole.words
    check_dead(tmp_path / "whole", whole.acks, reference, closed=True)
    chosen = moments(whole.ops, random.Random(SEED))  # noqa: S311 - no secret
    died = 0
    dead: tuple[Path, Death] | None = None
    for number in range(len(chosen) + 1):
        run_dir = tmp_path / f"run-{number}"
        if number < len(chosen):
            acks = tmp_path / f"acks-{number}"
            nursery.send(run_dir, acks, steps=steps, ops=True, die_at=chosen[number])
        if dead is not None:
            check_dead(dead[0], dead[1].acks, reference, closed=dead[1].code == 0)
            shutil.rmtree(dead[0], ignore_errors=True)
        if number < len(chosen):
            death = nursery.receive()
            assert death.signal == signal.SIGKILL or death.code == 0, f"{chosen[number]}: {death.words}"
            died += death.signal == signal.SIGKILL
            dead = run_dir, death
    print(f"KILL_SEED={SEED}: {died} deaths at {len(chosen)} moments")
    # How often a kind comes differs a little from run to run; the first times come always.
    assert died > len(chosen) // 2


# --- resumed, and killed again ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """What one attempt promised, and what it left: the step under way when it died may be among that."""

    acks: list[Ack]
    recorded: list[Ack]

    @property
    def due(self) -> set[int]:
        return promised_measurements(self.acks, every=_EVERY)


def attempt_of(run_dir: Path, number: int, acks: list[Ack]) -> Attempt:
    rows = open_run(run_dir, attempt=number).table("steps", ["step", "loss"]).to_pylist()
    under_way = [Ack(row["step"], row["loss"]) for row in rows[len(acks) :]]
    assert len(under_way) <= 1, f"{len(acks)} steps were promised, {len(rows)} are there"
    return Attempt(acks, acks + under_way)


def effective(attempts: list[Attempt]) -> tuple[list[Ack], set[int]]:
    """What the attempts show together: a later one's first step hides all of earlier ones from there on."""
    shown: list[Ack] = []
    due: set[int] = set()
    for attempt in attempts:
        if attempt.recorded:
            first = attempt.recorded[0].step
            shown = [ack for ack in shown if ack.step < first]
            due = {step for step in due if step < first}
        shown = shown + attempt.recorded
        due |= attempt.due
    return shown, due


def check_attempts(run_dir: Path, attempts: list[Attempt], reference: Reference) -> None:
    """Each attempt shows its own rows, and all together the effective ones."""
    for number, attempt in enumerate(attempts, 1):
        _check_view(opened(run_dir, attempt=number), attempt.recorded, attempt.due, reference)
    _check_view(opened(run_dir), *effective(attempts), reference)


def _check_view(run: Run, recorded: list[Ack], due: set[int], reference: Reference) -> None:
    assert run.table("steps", ["step"]).num_rows == len(recorded)
    check_steps(run.table("steps"), recorded, every=_EVERY)
    check_measured(run, due, reference, every=_EVERY)
    check_events(run)
    assert run.damaged == {}


@pytest.mark.parametrize("chain", range(int(os.environ.get("CHAINS", "5"))))
def test_runs_killed_and_resumed_over_and_over_show_what_the_last_attempt_of_each_step_did(
    nursery: Nursery, reference: Reference, tmp_path: Path, chain: int
) -> None:
    chance = random.Random(1000 * SEED + chain)  # noqa: S311 - no secret
    run_dir, state = tmp_path / "run", tmp_path / "state"
    attempts: list[Attempt] = []
    claimed = 0
    for number in range(6):
        last = number == 5
        kill: dict[str, Any] | None = {
            "signal": "SIGKILL",
            "after_acks": chance.choice([0, 1, chance.randrange(40)]),
            "delay_s": chance.uniform(0.0, 0.01) if chance.random() < 0.7 else chance.uniform(0.0, 0.1),
        }
        death = nursery.record(
            run_dir,
            tmp_path / f"acks-{number}",
            every=_EVERY,
            steps=_LONGEST if not last else 100 if state.exists() else 40,
            kill=None if last else kill,
            state=str(state),
            save_every=chance.choice([7, 12]),
            resume=True,
        )
        assert death.signal == signal.SIGKILL or death.code == 0, death.words
        if not (run_dir / MANIFEST).exists():
            assert not death.acks
            continue
        # An attempt that died before it was written down is no attempt.
        known = len(open_run(run_dir).info["attempts"])
        if known == claimed:
            assert not death.acks, "an attempt recorded steps that run.json does not know of"
            continue
        assert known == claimed + 1
        claimed = known
        attempts.append(attempt_of(run_dir, claimed, death.acks))
        check_attempts(run_dir, attempts, reference)
        if chance.random() < 0.4:
            compact_run(run_dir)
            check_attempts(run_dir, attempts, reference)
    assert open_run(run_dir).info["state"] == "finished"
    check_coarse(open_run(run_dir), 16)


# --- other ways to end ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "state", "error", "closed"),
    [
        ("close", "finished", None, True),
        ("no close", "finished", None, True),
        ("exit in a thread", "finished", None, True),
        ("exception", "crashed", "RuntimeError: the loss is not what it was", True),
        ("os._exit", "crashed", None, False),
    ],
)
def test_every_ending_of_a_process_leaves_every_step_and_says_how_it_ended(
    nursery: Nursery,
    reference: Reference,
    tmp_path: Path,
    ending: str,
    state: str,
    error: str | None,
    closed: bool,  # noqa: FBT001 - a case
) -> None:
    death = nursery.record(tmp_path / "run", tmp_path / "acks", steps=50, ending=ending, every=_EVERY)
    assert death.steps == list(range(50)), death.words
    info = open_run(tmp_path / "run").info
    assert (info["state"], info["error"]) == (state, error)
    check_dead(tmp_path / "run", death.acks, reference, closed=closed)


@pytest.mark.parametrize(("name", "error"), [("SIGTERM", None), ("SIGINT", "KeyboardInterrupt: ")])
def test_a_signal_ends_a_run_that_stays_whole(
    nursery: Nursery, reference: Reference, tmp_path: Path, name: str, error: str | None
) -> None:
    death = nursery.record(
        tmp_path / "run",
        tmp_path / "acks",
        steps=_LONGEST,
        every=_EVERY,
        kill={"signal": name, "after_acks": 30, "delay_s": 0.01},
    )
    assert death.signal == (signal.SIGTERM if name == "SIGTERM" else 0), death.words
    info = open_run(tmp_path / "run").info
    assert (info["state"], info["error"]) == ("crashed", error)
    check_dead(tmp_path / "run", death.acks, reference)
