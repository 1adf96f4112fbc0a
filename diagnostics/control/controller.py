"""The live end of the control channel: applies commands at step boundaries and says what they changed."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diagnostics.attach.site import Site
from diagnostics.control.commands import as_typed, check_command
from diagnostics.control.mailbox import Command, Refused, take_commands, write_journal
from diagnostics.errors import CommandError, DiagnosticsError
from diagnostics.remedies.spectral_bound import DEFAULT_TAU, SpectralBound
from diagnostics.store.format import CONTROL_INBOX

MODES = ("off", "observe", "suggest", "act")

Announce = Callable[[str, str, str, dict[str, Any]], None]
Effect = tuple[dict[str, Any], dict[str, Any]]


class Controller:
    """Obeys people's commands, and in mode `act` its own alerts, on one model and its optimizers.

    `poll` may run on any thread; `apply_waiting` must run on the training thread between two steps.

    Args:
        run_dir: the run directory.
        run_id: commands for another run are rejected.
        model: the attached model.
        optimizers: the torch optimizers that remedies act on.
        mode: `off`, `observe` (commands are refused), `suggest` (commands are obeyed, the run proposes its
            own) or `act` (it also acts by itself).
        sites: gives the attention sites as known now.
        announce: writes an event: kind, severity, message, data.
        ranks: processes in the job; where there are several, nothing that changes numbers is done in this one alone.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        mode: str,
        sites: Callable[[], Sequence[Site]],
        announce: Announce,
        ranks: int = 1,
    ) -> None:
        if mode not in MODES:
            raise DiagnosticsError(f"control is {mode!r}, it must be one of {', '.join(MODES)}")
        self.mode = mode
        self._run_dir = run_dir
        self._run_id = run_id
        self._model = model
        self._optimizers = tuple(optimizers)
        self._sites = sites
        self._announce = announce
        self._ranks = ranks
        self._waiting: deque[Command] = deque()
        self._armed: dict[int, SpectralBound] = {}
        self._proposed: set[str] = set()
        self._taken: set[str] = set()
        if mode != "off":
            # Only the run's own user may send: whoever can write here can change somebody's training.
            (run_dir / CONTROL_INBOX).mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def armed(self) -> dict[str, dict[str, Any]]:
        """Armed remedies by name, with what they have done so far."""
        return {SpectralBound.name: self._bound_state()} if self._armed else {}

    def poll(self) -> None:
        """Takes what lies in the inbox; it is applied at the next step boundary."""
        if self.mode == "off":
            return
        for taken in take_commands(self._run_dir):
            if isinstance(taken, Refused):
                self._refuse(taken)
            elif taken.id in self._taken:
                # The same command delivered again: its answer is in the journal already.
                self._announce(
                    "control",
                    "warning",
                    f"{taken.command} {taken.id} came twice, once counts",
                    {"id": taken.id},
                )
            else:
                self._taken.add(taken.id)
                self._waiting.append(taken)

    def _refuse(self, refused: Refused) -> None:
        record = {
            "id": refused.id,
            "status": "rejected",
            "reason": refused.reason,
            "time_s": time.time(),
            "before": None,
            "after": None,
        }
        self._announce("control", "warning", refused.reason, record)
        write_journal(self._run_dir, record)

    def propose(self, command: str, arguments: dict[str, Any], reason: str) -> None:
        """The run's own wish after an alert: applied in mode `act`, written down in mode `suggest`."""
        if self.mode not in ("suggest", "act") or command in self._proposed or not self._optimizers:
            return
        self._proposed.add(command)
        if self._ranks > 1:
            data = {"command": command, "arguments": arguments}
            self._announce(
                "suggestion", "info", f"{reason}; {command} would help, but {self._one_of_several()}", data
            )
            return
        if self.mode == "act":
            identity = f"own-{int(time.time() * 1e6):016d}"
            self._waiting.append(Command(identity, command, arguments, self._run_id, time.time() + 3600.0))
            return
        typed = as_typed(command, arguments, str(self._run_dir))
        self._announce(
            "suggestion", "info", f"{reason}; to act: {typed}", {"command": command, "arguments": arguments}
        )

    def apply_waiting(self, step: int) -> None:
        """Carries out what waits, oldest first; `step` is the first step that will feel it."""
        while self._waiting:
            command = self._waiting.popleft()
            record: dict[str, Any] = {
                "id": command.id,
                "command": command.command,
                "arguments": dict(command.arguments),
                "step": step,
                "time_s": time.time(),
                "reason": None,
                "before": None,
                "after": None,
            }
            try:
                record["before"], record["after"] = self._carry_out(command)
                record["status"] = "applied"
            except DiagnosticsError as error:
                expired = isinstance(error, _ExpiredError)
                record |= {"status": "expired" if expired else "rejected", "reason": str(error)}
            # The event first: whoever waits for the journal then finds it in the tables too.
            severity = "info" if record["status"] == "applied" else "warning"
            self._announce("control", severity, _sentence(record), record)
            write_journal(self._run_dir, record)

    def close(self) -> None:
        for bound in self._armed.values():
            bound.remove()
        self._armed.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "spectral-bound": {
                position: self._armed[id(optimizer)].state_dict()
                for position, optimizer in enumerate(self._optimizers)
                if id(optimizer) in self._armed
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Arms again what was armed when the state was taken."""
        self.close()
        saved_by_position = state.get("spectral-bound", {})
        if saved_by_position and self._ranks > 1:
            self._announce(
                "warning",
                "warning",
                f"the remedy of the saved state is not armed: {self._one_of_several()}",
                {},
            )
            return
        for position, optimizer in enumerate(self._optimizers):
            if position not in saved_by_position:
                continue
            saved = saved_by_position[position]
            bound = SpectralBound.for_sites(optimizer, saved["tau"], self._model, self._sites())
            bound.load_state_dict(saved)
            self._armed[id(optimizer)] = bound

    def _carry_out(self, command: Command) -> Effect:
        if command.run_id != self._run_id:
            raise CommandError(f"the command is for run {command.run_id}, this is run {self._run_id}")
        if not time.time() <= command.expires_s:
            raise _ExpiredError("the command had expired when the run reached a step boundary")
        if self.mode == "observe":
            raise CommandError("the run was started with control='observe': it takes no commands")
        arguments = check_command(command.command, command.arguments)
        if command.command == "status":
            return {}, {"mode": self.mode, "armed": self.armed}
        if self._ranks > 1:
            raise CommandError(self._one_of_several())
        if command.command == "spectral-bound":
            return self._arm_bound(arguments["tau"])
        if command.command == "disarm":
            return self._disarm(arguments["name"])
        raise CommandError(
            f"this run cannot carry out {command.command}; it knows spectral-bound, disarm and status"
        )

    def _one_of_several(self) -> str:
        return (
            f"the job has {self._ranks} ranks, and a remedy armed in this one alone would let their replicas drift "
            "apart: make a SpectralBound in the training script, on every rank"
        )

    def _arm_bound(self, tau: float) -> Effect:
        if not self._optimizers:
            raise CommandError("the recorder was given no torch optimizer, so there is no step to bound")
        before = self._bound_state()
        for bound in self._armed.values():
            bound.tau = tau
        refusals = []
        for optimizer in self._optimizers:
            if id(optimizer) in self._armed:
                continue
            try:
                bound = SpectralBound.for_sites(optimizer, tau, self._model, self._sites())
            except DiagnosticsError as error:
                # One of several optimizers may hold vectors only.
                refusals.append(error)
            else:
                self._armed[id(optimizer)] = bound
        if not self._armed:
            raise refusals[0]
        return before, self._bound_state()

    def _disarm(self, name: str) -> Effect:
        if name != SpectralBound.name or not self._armed:
            armed = ", ".join(self.armed) or "nothing"
            raise CommandError(f"{name!r} is not armed; armed now: {armed}")
        before = self._bound_state()
        self.close()
        return before, self._bound_state()

    def _bound_state(self) -> dict[str, Any]:
        if not self._armed:
            return {"armed": False, "tau": None}
        summaries = [bound.summary() for bound in self._armed.values()]
        return {
            "armed": True,
            "tau": summaries[0]["tau"],
            "matrices": sum(int(s["matrices"]) for s in summaries),
            "steps": summaries[0]["steps"],
            "fired_share": max(s["fired_share"] for s in summaries),
            "smallest_scale": min(s["smallest_scale"] for s in summaries),
        }


class _ExpiredError(CommandError):
    """A command that came too late."""


DEFAULT_ACT = ("spectral-bound", {"tau": DEFAULT_TAU})
"""What an alert of collapse leads to: the one remedy that changes no weight at the instant it is armed."""


def _sentence(record: dict[str, Any]) -> str:
    typed = as_typed(record["command"], record["arguments"]).removeprefix("diagnostics control RUN ")
    if record["status"] == "applied":
        return f"{typed} applied from step {record['step']}"
    return f"{typed} {record['status']}: {record['reason']}"
