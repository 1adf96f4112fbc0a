"""The public contract as literals: whoever changes one of these changes what users and their scripts rely on."""

import json
from pathlib import Path

import pytest
import typer
from synthetic import write_run

import diagnostics
from diagnostics.cli import exits
from diagnostics.cli.main import app, main
from diagnostics.cli.report import FailOn
from diagnostics.control.commands import COMMANDS
from diagnostics.detect.finding import SEVERITIES, STATUSES
from diagnostics.store.format import CONTROL_INBOX, CONTROL_JOURNAL, MANIFEST, SCHEMAS
from diagnostics.store.manifest import STATES


def test_the_names_of_the_package_are_the_contracts() -> None:
    assert set(diagnostics.__all__) == {
        "Controller",
        "Recorder",
        "SpectralBound",
        "__version__",
        "assess",
        "open_run",
    }
    assert all(hasattr(diagnostics, name) for name in diagnostics.__all__)


def test_the_tables_have_the_contracts_columns_and_types() -> None:
    spectrum = {
        "sigma1": "float",
        "frobenius": "float",
        "sec_1": "float",
        "sec_4": "float",
        "sec_10": "float",
    }
    assert {
        table: {field.name: str(field.type) for field in schema} for table, schema in SCHEMAS.items()
    } == {
        "steps": {
            "step": "int64",
            "time_s": "double",
            "loss": "double",
            "lr": "double",
            "grad_norm": "double",
            "measured": "bool",
            "overhead_s": "double",
        },
        "attention": {
            "step": "int64",
            "layer": "string",
            "head": "int16",
            "entropy": "float",
            "entropy_min": "float",
            "entropy_frac": "float",
            "entropy_bound": "float",
            "max_logit": "float",
            "rank_frac": "float",
            "rows": "int32",
        },
        "spectra": {
            "step": "int64",
            "layer": "string",
            "head": "int16",
            **spectrum,
            "stable_rank": "float",
            "effective_rank": "float",
            "singular_values": "list<item: float>",
        },
        "updates": {
            "step": "int64",
            "parameter": "string",
            "sigma1": "float",
            "update_sigma1": "float",
            "ratio": "float",
            "frobenius_ratio": "float",
            "scale": "float",
        },
        "events": {
            "step": "int64",
            "time_s": "double",
            "kind": "string",
            "severity": "string",
            "layer": "string",
            "head": "int16",
            "message": "string",
            "data": "string",
        },
    }


def test_the_files_of_a_run_directory_have_the_contracts_names() -> None:
    assert (MANIFEST, str(CONTROL_INBOX), str(CONTROL_JOURNAL)) == (
        "run.json",
        "control/inbox",
        "control/journal.jsonl",
    )


def test_the_verbs_take_the_contracts_arguments_and_options() -> None:
    command = typer.main.get_command(app)
    verbs = {
        verb: sorted(
            max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.name.upper()
            for parameter in each.params
        )
        for verb, each in vars(command)["commands"].items()
    }
    assert verbs == {
        "demo": ["--no-dashboard", "--out", "--seed", "--steps"],
        "list": ["--json", "ROOT"],
        "report": ["--fail-on", "--json", "--up-to-step", "PATH"],
        "watch": ["RUN"],
        "dashboard": ["--allow-control", "--host", "--port", "ROOT"],
        "control": ["--factor", "--tau", "--threshold", "COMMAND", "NAME", "RUN"],
        "export": ["--out", "--to", "RUN"],
        "compact": ["RUN"],
    }


def test_the_commands_to_a_run_take_the_contracts_arguments() -> None:
    assert {name: sorted(arguments) for name, arguments in COMMANDS.items()} == {
        "spectral-bound": ["tau"],
        "lr-scale": ["factor"],
        "qk-clip": ["threshold"],
        "disarm": ["name"],
        "checkpoint": [],
        "stop": [],
        "status": [],
    }


def test_the_exit_codes_are_the_contracts() -> None:
    assert (exits.OK, exits.FOUND, exits.USAGE, exits.NO_DATA) == (0, 1, 2, 3)
    assert [choice.value for choice in FailOn] == ["at-risk", "collapsed", "diverged"]
    codes = {
        (status, fail_on.value): exits.exit_code(status, fail_on.value)
        for status in STATUSES
        for fail_on in FailOn
    }
    assert {pair for pair, code in codes.items() if code == 1} == {
        ("at-risk", "at-risk"),
        ("collapsed", "at-risk"),
        ("collapsed", "collapsed"),
        ("diverged", "at-risk"),
        ("diverged", "collapsed"),
        ("diverged", "diverged"),
    }
    assert {status for (status, _), code in codes.items() if code == 3} == {"no-data"}
    assert exits.worst([0, 3, 2, 1]) == 1
    assert exits.worst([0, 3, 2]) == 2
    assert exits.worst([0, 3]) == 3
    assert exits.worst([]) == 0


def test_statuses_severities_and_states_are_the_contracts() -> None:
    assert set(STATUSES) == {"healthy", "at-risk", "collapsed", "diverged", "no-data"}
    assert SEVERITIES == ("info", "warning", "critical")
    assert set(STATES) == {"running", "stalled", "crashed", "finished"}


def test_report_json_has_the_contracts_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", "--json", str(write_run(tmp_path, steps=100, collapse=True))])
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["runs"]
    # `missing`, and from `message` on, are ours beside the contract's.
    assert set(document["runs"][0]) == {"run", "status", "step", "findings", "forecast", "missing"}
    assert set(document["runs"][0]["findings"][0]) == {
        "kind",
        "severity",
        "layer",
        "head",
        "first_step",
        "evidence",
        "advice",
        "message",
        "status",
        "raised_step",
        "last_step",
    }


def test_list_json_has_the_contracts_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    main(["list", "--json", str(tmp_path)])
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["runs"]
    assert set(document["runs"][0]) == {"name", "state", "steps", "status", "path"}
