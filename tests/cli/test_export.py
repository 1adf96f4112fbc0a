import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from synthetic import write_run, write_table

from diagnostics.store.read import open_run

Command = Callable[..., Any]

TABLES = ["steps", "attention", "spectra", "updates", "events"]


def test_csv_gives_a_file_per_table_with_the_numbers_of_the_run(diagnostics: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, collapse=True)
    ended = diagnostics("export", run, "--to", "csv", "--out", tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{table}.csv" for table in TABLES
    )
    for table in TABLES:
        with (tmp_path / "out" / f"{table}.csv").open(newline="") as file:
            read = list(csv.DictReader(file))
        expected = open_run(run).table(table).to_pylist()
        assert len(read) == len(expected)
        for row, truth in zip(read, expected, strict=True):
            for name, value in truth.items():
                if name == "singular_values":
                    # Nine significant digits give a float32 back exactly; the tables widen it to float64.
                    assert json.loads(row[name]) == pytest.approx(value, rel=1e-8)
                elif value is None:
                    assert row[name] == ""
                elif isinstance(value, bool):
                    assert row[name] == str(value).lower()
                elif isinstance(value, float):
                    assert float(row[name]) == pytest.approx(value, rel=1e-8)
                else:
                    assert row[name] == str(value)


def test_jsonl_gives_a_strict_json_object_per_row(diagnostics: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=30)
    diagnostics("export", run, "--to", "jsonl", "--out", tmp_path / "out")
    lines = (tmp_path / "out" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == open_run(run).table("steps").to_pylist()


@pytest.mark.parametrize("to", ["csv", "jsonl"])
def test_not_measured_stays_apart_from_not_finite(diagnostics: Command, tmp_path: Path, to: str) -> None:
    run = write_run(tmp_path, steps=0)
    losses = [None, math.nan, math.inf, -math.inf, 1.5]
    write_table(
        run, "steps", [{"step": step, "time_s": 0.0, "loss": loss} for step, loss in enumerate(losses)]
    )
    diagnostics("export", run, "--to", to, "--out", tmp_path / "out")
    if to == "csv":
        with (tmp_path / "out" / "steps.csv").open(newline="") as file:
            assert [row["loss"] for row in csv.DictReader(file)] == [
                "",
                "NaN",
                "Infinity",
                "-Infinity",
                "1.5",
            ]
    else:
        lines = (tmp_path / "out" / "steps.jsonl").read_text().splitlines()
        assert [json.loads(line)["loss"] for line in lines] == [None, "NaN", "Infinity", "-Infinity", 1.5]


def test_a_float32_is_written_with_the_digits_it_has(diagnostics: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=0)
    write_table(run, "attention", [{"step": 0, "layer": "a", "head": 0, "entropy": 0.1}])
    diagnostics("export", run, "--to", "csv", "--out", tmp_path / "out")
    # float64(float32(0.1)) is 0.10000000149011612; nine digits are all that a float32 tells apart.
    assert ",0.100000001," in (tmp_path / "out" / "attention.csv").read_text()


def test_a_user_scalar_is_exported_too(diagnostics: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=0)
    write_table(run, "steps", [{"step": 0, "time_s": 0.0, "reward": 0.25}])
    diagnostics("export", run, "--to", "jsonl", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "steps.jsonl").read_text())["reward"] == 0.25


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_nothing_is_overwritten(diagnostics: Command, tmp_path: Path, taken: str) -> None:
    out = tmp_path / "out"
    kept = out if taken == "file" else out / "mine.csv"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    ended = diagnostics("export", write_run(tmp_path), "--to", "csv", "--out", out)
    assert (ended.code, ended.out) == (2, "")
    assert str(out) in ended.err
    assert kept.read_text() == "mine"


def test_an_unknown_format_gives_2(diagnostics: Command, tmp_path: Path) -> None:
    assert diagnostics("export", write_run(tmp_path), "--to", "xlsx", "--out", tmp_path / "out").code == 2


def test_a_path_that_is_no_run_gives_2(diagnostics: Command, tmp_path: Path) -> None:
    ended = diagnostics("export", tmp_path, "--to", "csv", "--out", tmp_path / "out")
    assert ended.code == 2
    assert not (tmp_path / "out").exists()


def test_tensorboard_says_what_to_install_where_it_is_missing(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    ended = diagnostics("export", write_run(tmp_path), "--to", "tensorboard", "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (2, "")
    assert "pip install tensorboard" in ended.err
    assert not (tmp_path / "out").exists()


def test_tensorboard_is_given_every_measured_number_once_at_its_step_and_time(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tensorboard is no dependency, not even for development: its three classes are stood in for.
    events: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "out")

        def add_event(self, event: Any) -> None:
            events.append(event)

        def close(self) -> None:
            events.append("closed")

    def summary(value: list[Any]) -> list[Any]:
        return value

    summary.Value = SimpleNamespace  # type: ignore[attr-defined]
    modules: dict[str, dict[str, Any]] = {
        "tensorboard": {},
        "tensorboard.summary": {},
        "tensorboard.summary.writer": {},
        "tensorboard.summary.writer.event_file_writer": {"EventFileWriter": Writer},
        "tensorboard.compat": {},
        "tensorboard.compat.proto": {},
        "tensorboard.compat.proto.event_pb2": {"Event": SimpleNamespace},
        "tensorboard.compat.proto.summary_pb2": {"Summary": summary},
    }
    for name, parts in modules.items():
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)

    run = write_run(tmp_path, steps=1)
    ended = diagnostics("export", run, "--to", "tensorboard", "--out", tmp_path / "out")
    assert (ended.code, events.pop()) == (0, "closed")
    time_s = open_run(run).steps()["time_s"][0]
    assert {(event.step, event.wall_time) for event in events} == {(0, time_s)}
    values = [(value.tag, value.simple_value) for event in events for value in event.summary]
    assert len(values) == len({tag for tag, _ in values})
    written = dict(values)
    assert written["steps/loss"] == open_run(run).steps()["loss"][0]
    assert written["attention/blocks.1.attn/head1/entropy"] == pytest.approx(3.52, rel=1e-6)
    assert written["updates/blocks.0.attn.c_attn.weight/ratio"] == pytest.approx(0.01, rel=1e-6)
    # 4 of a step (loss, lr, grad_norm, overhead_s), 2 layers of 2 heads with 7 and 7, 2 matrices with 5.
    assert len(values) == 4 + 4 * (7 + 7) + 2 * 5
