"""Every page on runs with known contents: it is drawn without an exception and says what a person must read."""

import json
import math
import threading
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from big_runs import BigRun, write_big_run
from streamlit.testing.v1 import AppTest
from synthetic import LAYERS, manifest, write_run, write_table

from diagnostics.app.aside import ASIDE
from diagnostics.app.data import READER, Reader
from diagnostics.app.summary import highest, lowest
from diagnostics.app.wording import verdict
from diagnostics.control.mailbox import Command, take_commands, write_journal
from diagnostics.detect.finding import Finding
from diagnostics.report import Report, assess
from diagnostics.store.format import PartName
from diagnostics.store.manifest import write_manifest

Open = Callable[..., AppTest]

SECTIONS = (
    "Layers and heads",
    "Heads over training",
    "Singular spectrum",
    "Updates",
    "Other scalars",
    "Events",
    "Run",
)


@pytest.fixture
def open_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    def opened(*flags: str, root: Path = tmp_path, **address: str | list[str]) -> AppTest:
        main = str(files("diagnostics.app") / "main.py")
        monkeypatch.setattr("sys.argv", [main, str(root), *flags])
        page = AppTest.from_file(main, default_timeout=60)
        for key, value in address.items():
            page.query_params[key] = value
        page.run()
        assert not page.exception, page.exception
        return page

    return opened


def words(page: AppTest) -> str:
    """Everything a person can read outside tables and charts, Markdown escapes removed."""
    kinds = ("header", "markdown", "caption", "info", "warning", "error", "success", "subheader")
    elements: list[Any] = [one for kind in kinds for one in page.get(kind)]
    return "\n".join(str(one.value) for one in elements).replace("\\", "")


def table(page: AppTest) -> Any:
    """The page's first table, by run; Any: pandas' types of single cells help nobody here."""
    return page.dataframe[0].value.set_index("run")


def section(page: AppTest, name: str) -> AppTest:
    page.button_group(key="section").set_value(name).run()
    assert not page.exception, page.exception
    return page


def charts(page: AppTest) -> list[str]:
    """Every chart as the JSON that is sent to the browser."""
    elements: list[Any] = list(page.get("bidi_component"))
    return [json.loads(one.proto.json) for one in elements]


def test_the_list_shows_every_run(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "healthy")
    write_run(tmp_path / "deep", "collapse", collapse=True)
    rows = table(open_page())
    assert sorted(rows.index) == ["deep/collapse", "healthy"]
    assert rows.loc["healthy", "state"].endswith("finished")
    assert rows.loc["healthy", "steps"] == 100
    assert rows.loc["healthy", "lowest entropy"] == pytest.approx(3.52)
    assert rows.loc["deep/collapse", "lowest entropy"] < 0.5
    assert rows.loc["deep/collapse", "highest mean SEC"] > 0.9
    for name in rows.index:
        assert rows.loc[name, "status"].endswith(assess(tmp_path / name).status)


def test_live_runs_come_first(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "a", started_s=time.time())
    write_run(tmp_path, "b", state="running", started_s=time.time() - 1000.0)
    assert table(open_page()).index.tolist() == ["b", "a"]


def test_an_empty_root_says_what_to_do(open_page: Open) -> None:
    said = words(open_page())
    assert "There is no run below" in said
    assert "Recorder" in said


def test_a_root_that_is_missing_is_an_error_in_words(tmp_path: Path, open_page: Open) -> None:
    assert "is not a directory" in words(open_page(root=tmp_path / "nothing"))


def test_a_server_without_a_root_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    main = str(files("diagnostics.app") / "main.py")
    monkeypatch.setattr("sys.argv", [main])
    page = AppTest.from_file(main, default_timeout=60).run()
    assert "diagnostics dashboard ROOT" in words(page)


def test_an_unreadable_run_is_named_and_the_others_are_listed(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "good")
    (write_run(tmp_path, "bad") / "run.json").write_text("{half")
    page = open_page()
    assert sorted(table(page).index) == ["bad", "good"]
    assert "cannot be read" in words(page)


def test_one_chosen_run_is_opened_and_two_are_compared(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "a")
    write_run(tmp_path, "b")
    page = open_page()
    page.multiselect(key="chosen-runs").set_value(["a"]).run()
    page.button(key="open-chosen").click().run()
    assert page.query_params["run"] == "a"
    assert page.header[0].value == "a"
    page.button(key="back").click().run()
    assert "run" not in page.query_params
    page.multiselect(key="chosen-runs").set_value(["a", "b"]).run()
    page.button(key="open-chosen").click().run()
    assert list(page.query_params["compare"]) == ["a", "b"]
    assert not page.exception


@pytest.mark.parametrize("collapse", [False, True])
def test_a_run_page_shows_the_verdict_of_assess_and_every_section(
    tmp_path: Path, open_page: Open, *, collapse: bool
) -> None:
    write_run(tmp_path, "run-1", collapse=collapse)
    page = open_page(run="run-1")
    assert page.header[0].value.replace("\\", "") == "run-1"
    assert verdict(assess(tmp_path / "run-1")) in words(page)
    assert len(charts(page)) == 2
    for name in SECTIONS:
        section(page, name)


def test_a_root_that_is_a_run_opens_it(tmp_path: Path, open_page: Open) -> None:
    run_dir = write_run(tmp_path, "alone")
    page = open_page(root=run_dir)
    assert page.header[0].value == "alone"
    assert not [button for button in page.button if button.key == "back"]


def test_an_unknown_run_is_named_and_the_list_is_shown(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "here")
    page = open_page(run="../etc")
    assert "There is no run '../etc'" in words(page)
    assert table(page).index.tolist() == ["here"]


def test_an_empty_run_says_what_it_waits_for(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "empty", steps=0)
    page = open_page(run="empty")
    assert "closed no step yet" in words(page)
    for name in SECTIONS:
        section(page, name)
    assert len(charts(page)) == 0


def test_a_run_without_attention_says_what_is_missing(tmp_path: Path, open_page: Open) -> None:
    run_dir = write_run(tmp_path, "no-attention")
    for part in (run_dir / "attention").iterdir():
        part.unlink()
    page = open_page(run="no-attention")
    assert len(charts(page)) == 1
    assert "Nothing was recorded in the attention table" in words(page)
    page.selectbox(key="heat-metric").select_index(6).run()
    assert len(charts(page)) == 2


def test_a_damaged_file_is_named(tmp_path: Path, open_page: Open) -> None:
    run_dir = write_run(tmp_path, "damaged")
    (run_dir / "spectra" / "part-000000000100-000000000190-000001.parquet").write_bytes(b"PAR1 and no more")
    page = open_page(run="damaged")
    assert "spectra/part-000000000100-000000000190-000001.parquet" in words(page)
    assert len(charts(page)) == 2


def test_nan_losses_are_drawn_and_said(tmp_path: Path, open_page: Open) -> None:
    run_dir = write_run(tmp_path, "nan")
    rows = [
        {"step": step, "time_s": time.time(), "loss": math.nan, "measured": False} for step in range(100, 120)
    ]
    write_table(run_dir, "steps", rows, number=1)
    page = open_page(run="nan")
    assert "loss is NaN from step 100" in charts(page)[0]


def test_findings_are_shown_worst_first_with_evidence_and_advice(
    tmp_path: Path, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, "sick")
    finding = Finding(
        kind="entropy-collapse",
        severity="critical",
        layer=LAYERS[0],
        head=1,
        first_step=50,
        evidence={"entropy": 0.3125, "entropy_healthy": [2.0, 3.5], "sec_1": 0.97},
        advice="Arm the bound: `diagnostics control RUN spectral-bound --tau 0.01`.",
        status="collapsed",
        message="Attention entropy has collapsed in blocks.0.attn head 1.",
    )
    late = Finding(
        kind="loss-stall", severity="warning", layer=None, head=None, first_step=70, status="at-risk"
    )
    report = Report(
        "sick",
        "collapsed",
        99,
        (finding, late),
        {"steps_to_collapse": 120.0, "low": 80.0, "high": 200.0, "confidence": 0.75},
        ("the update ratios: no optimizer was given",),
    )
    monkeypatch.setattr(Reader, "report", lambda _reader, _run_dir: report)
    page = open_page(run="sick")
    said = words(page)
    assert "Attention entropy has collapsed in blocks.0.attn head 1. (judged up to step 99)" in page.error[
        0
    ].value.replace("\\", "")
    assert said.index("entropy-collapse in blocks.0.attn head 1, since step 50") < said.index(
        "loss-stall, since step 70"
    )
    assert "entropy 0.3125 (healthy: [2, 3.5]) · sec_1 0.97" in said
    assert f"Arm the bound: `diagnostics control {tmp_path / 'sick'} spectral-bound --tau 0.01`." in said
    assert "about 120 steps (between 80 and 200), confidence 0.75" in said
    assert "no optimizer was given" in said


def test_the_step_slider_moves_the_heat_map(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "run")
    page = open_page(run="run")
    assert "at step 90" in charts(page)[1]
    page.select_slider(key="heat-step").set_value(20).run()
    assert "at step 20" in charts(page)[1]


def test_another_metric_with_other_steps_shows_a_step_of_its_own(tmp_path: Path, open_page: Open) -> None:
    run_dir = write_run(tmp_path, "run")
    rows = [{"step": 95, "layer": LAYERS[0], "head": 0, "sec_1": 0.5}]
    write_table(run_dir, "spectra", rows, number=1)
    page = open_page(run="run")
    page.selectbox(key="heat-metric").select_index(6).run()
    page.select_slider(key="heat-step").set_value(95).run()
    assert "(share of energy) at step 95" in charts(page)[1]
    page.selectbox(key="heat-metric").select_index(0).run()
    assert not page.exception
    assert "attention entropy (nats) at step 90" in charts(page)[1]


def test_the_spectrum_starts_at_the_worst_head(
    tmp_path: Path, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, "sick")
    finding = Finding("entropy-collapse", "critical", LAYERS[1], 1, 50, status="collapsed")
    monkeypatch.setattr(
        Reader, "report", lambda _reader, _run_dir: Report("sick", "collapsed", 99, (finding,))
    )
    page = section(open_page(run="sick"), "Singular spectrum")
    assert f"{LAYERS[1]} head 1" in charts(page)[1]
    page.selectbox(key="spectrum-layer").set_value(LAYERS[0]).run()
    assert not page.exception
    assert f"{LAYERS[0]} head" in charts(page)[1]


def test_a_live_run_shows_its_new_steps(tmp_path: Path, open_page: Open) -> None:
    run_dir = write_run(tmp_path, "live", state="running")
    page = open_page(run="live")
    assert "100 steps" in words(page)
    assert "at step 90" in charts(page)[1]
    rows = [{"step": 100, "layer": layer, "head": 0, "entropy": 1.0} for layer in LAYERS]
    write_table(run_dir, "attention", rows, number=1)
    write_table(
        run_dir, "steps", [{"step": 100, "time_s": time.time(), "loss": 1.0, "measured": True}], number=1
    )
    write_manifest(run_dir, manifest("live", state="running", steps=101))
    page.run()
    assert not page.exception
    assert "101 steps" in words(page)
    assert "at step 100" in charts(page)[1]


def test_runs_are_compared_in_one_figure_and_one_table(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "good")
    write_run(tmp_path, "bad", collapse=True)
    page = open_page(compare=["good", "bad"])
    rows = table(page)
    assert rows.index.tolist() == ["good", "bad"]
    # The last measured step is 90 of 99; from 30 % on the logits rise linearly from 1 by 150.
    assert rows.loc["bad", "largest logit"] == pytest.approx(1 + 150 * (90 / 99 - 0.3) / 0.7)
    assert rows.loc["good", "final loss"] < rows.loc["bad", "final loss"]
    assert len(charts(page)) == 1
    page.multiselect(key="compared-runs").set_value(["good"]).run()
    assert table(page).index.tolist() == ["good"]
    page.multiselect(key="compared-runs").set_value([]).run()
    assert "Choose two or more runs" in words(page)


def test_a_resumed_run_says_where_each_attempt_went_on(tmp_path: Path, open_page: Open) -> None:
    attempts = [
        {"attempt": 1, "first_step": 0, "state": "crashed", "started_s": 1.7e9, "ended_s": 1.7e9 + 50},
        {"attempt": 2, "first_step": 60, "state": "finished", "started_s": 1.7e9 + 90, "ended_s": None},
    ]
    run_dir = write_run(tmp_path, "again", attempt=2, attempts=attempts)
    rows = [{"step": step, "time_s": time.time(), "loss": 9.5, "measured": False} for step in range(60, 80)]
    path = write_table(run_dir, "steps", rows, number=1)
    path.rename(path.with_name(str(PartName(60, 79, 1, attempt=2))))
    assert table(open_page()).loc["again", "state"].endswith("finished, attempt 2")
    page = open_page(run="again")
    assert "attempt 2 resumed at step 60 (attempt 1: crashed)." in words(page)
    (resumed,) = [trace for trace in json.loads(charts(page)[0])["data"] if trace["name"] == "resumed"]
    assert resumed["text"][0] == "attempt 2 resumed at step 60 (attempt 1: crashed)"
    section(page, "Run")
    assert "Attempts" in words(page)
    assert [frame.value["attempt"].tolist() for frame in page.dataframe if "attempt" in frame.value] == [
        [1, 2]
    ]


@pytest.fixture
def long_run(tmp_path: Path) -> BigRun:
    # 80,000 steps are more than a page draws one by one, 8,000 measured ones more than it judges while someone waits.
    return write_big_run(tmp_path / "long", steps=80_000, every=10, layers=6, heads=4)


def test_a_long_run_shows_its_recorded_status_at_once_and_its_findings_later(
    long_run: BigRun, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding(
        "entropy-collapse", "critical", long_run.layers[2], 1, 50, status="collapsed", message="It fell."
    )
    report = Report("long", "collapsed", 79_990, (finding,))
    judging, judged = threading.Event(), threading.Event()

    def judge(run: str) -> Report:
        assert run == str(long_run.path)
        judging.set()
        assert judged.wait(60)
        return report

    monkeypatch.setattr("diagnostics.app.verdict.judge_apart", judge)
    page = open_page(run="long")
    assert judging.wait(60)
    said = words(page)
    assert "Healthy, say the detectors that ran beside it; 1 alert" in said
    assert "step 29,600: warning: attention entropy fell for one step" in said
    assert "Judging all of the run beside this page" in said
    assert len(charts(page)) == 2
    judged.set()
    ASIDE.wait(60)
    page.run()
    assert not page.exception
    assert "It fell. (judged up to step 79,990)" in words(page)
    for name in SECTIONS:
        section(page, name)


def test_a_run_too_long_to_be_judged_unasked_offers_it(
    long_run: BigRun, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagnostics.app.judging._MOST_ROWS_UNASKED", 1000)
    asked: list[str] = []

    def judge(run: str) -> str:
        asked.append(run)
        return "no disk"

    monkeypatch.setattr("diagnostics.app.verdict.judge_apart", judge)
    page = open_page(run="long")
    assert asked == []
    page.button(key="judge").click().run()
    ASIDE.wait(60)
    page.run()
    assert not page.exception
    assert asked == [str(long_run.path)]
    assert "could not be judged: no disk" in words(page)


def test_the_chart_of_a_long_run_holds_its_spikes(long_run: BigRun, open_page: Open) -> None:
    page = open_page(run="long")
    ASIDE.wait(60)
    page.run()
    assert "Each point stands for 16 steps" in words(page)
    page.button_group(key="heat-drawing").set_value("over training").run()
    assert not page.exception
    heads = json.loads(charts(page)[1])["layout"]["title"]["text"]
    assert heads == "attention entropy (nats) of every head, lowest per column"
    curves = READER.curves(str(long_run.path))
    assert highest(curves.loss) == long_run.loss_spike[1]
    assert lowest(curves.entropy) == long_run.entropy_dip[3]


def test_without_the_flag_there_is_no_control_panel(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "live", state="running")
    assert not [button for button in open_page(run="live").button if button.key == "control-arm"]


def test_a_finished_run_has_no_control_panel(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "done")
    assert not [
        button for button in open_page("--allow-control", run="done").button if button.key == "control-arm"
    ]


def test_a_command_is_sent_and_shown_as_done_only_when_the_run_says_so(
    tmp_path: Path, open_page: Open
) -> None:
    run_dir = write_run(tmp_path, "live", state="running")
    (run_dir / "control" / "inbox").mkdir(parents=True)
    page = open_page("--allow-control", run="live")
    page.number_input(key="control-tau").set_value(0.02)
    page.button(key="control-arm").click().run()
    assert not page.exception
    assert "has not answered yet" in words(page)
    (command,) = take_commands(run_dir)
    assert isinstance(command, Command)
    assert (command.command, command.arguments) == ("spectral-bound", {"tau": 0.02})
    record: dict[str, Any] = {"id": command.id, "command": command.command, "status": "applied", "step": 120}
    write_journal(run_dir, {**record, "before": None, "after": {"armed": True, "tau": 0.02}})
    page.run()
    assert "has not answered yet" not in words(page)
    assert "applied at step 120; after: armed yes, tau 0.02" in words(page)


def test_a_run_without_a_channel_refuses_in_words(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path, "live", state="running", control="off")
    page = open_page("--allow-control", run="live")
    page.button(key="control-disarm").click().run()
    assert "no control channel" in words(page)
