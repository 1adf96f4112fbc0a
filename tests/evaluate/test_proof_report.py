"""Tables of the corpus are read, and what was found stands where it belongs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagnostics.errors import DiagnosticsError
from sample_runs.evaluate.ablation import thin
from sample_runs.evaluate.corpus import load_corpus
from sample_runs.evaluate.inputs import inputs_hash
from sample_runs.evaluate.report import BEGIN, END, markdown, placed
from sample_runs.evaluate.sections import Section


def write_table(folder: Path, name: str, **about: object) -> None:
    told = {
        "family": "gpt",
        "cause": "none",
        "seed": 1,
        "label": "healthy",
        "onset": None,
        "sites": [],
        **about,
    }
    (folder / "tables").mkdir(exist_ok=True)
    arrays: dict[str, Any] = {
        "attention.entropy": np.ones((3, 2), dtype=np.float32),
        "updates.ratio": np.ones((3, 1), dtype=np.float32),
        "scalars.lr": np.full(8, 1e-3, dtype=np.float32),
    }
    np.savez_compressed(
        folder / "tables" / f"{name}.npz",
        steps=np.array([0, 5, 7], dtype=np.int32),
        every_step=np.arange(8, dtype=np.int32),
        ends=np.array([1, 6, 8], dtype=np.int32),
        losses=np.full(8, 2.0, dtype=np.float32),
        loss_given=np.ones(8, dtype=bool),
        heads=np.array(json.dumps([["blocks.0.attn", 0], ["blocks.0.attn", 1]])),
        parameters=np.array(json.dumps(["w"])),
        about=np.array(json.dumps(told)),
        **arrays,
    )


def test_a_packed_table_becomes_a_course(tmp_path: Path) -> None:
    write_table(tmp_path, "gpt-none-1")
    (course,) = load_corpus(tmp_path)
    assert (course.name, course.family, course.label, course.steps) == ("gpt-none-1", "gpt", "healthy", 8)
    assert course.block.heads == (("blocks.0.attn", 0), ("blocks.0.attn", 1))
    assert course.block.attention["entropy"].dtype == np.float64
    assert course.block.updates["ratio"].shape == (3, 1)


def test_a_label_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    write_table(tmp_path, "odd", label="fine")
    with pytest.raises(DiagnosticsError, match="label is 'fine', not one of healthy"):
        load_corpus(tmp_path)


def test_a_corpus_that_was_not_made_is_named_with_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DiagnosticsError, match="make corpus"):
        load_corpus(tmp_path)


def test_every_other_frame_keeps_every_step(tmp_path: Path) -> None:
    write_table(tmp_path, "gpt-none-1")
    thinned = thin(load_corpus(tmp_path)[0].block)
    assert thinned.steps.tolist() == [0, 7]
    assert thinned.ends.tolist() == [1, 8]
    assert len(thinned.every_step) == 8
    assert thinned.attention["entropy"].shape == (2, 2)


def test_the_region_between_the_markers_is_replaced_and_nothing_else() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert placed(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert placed(placed(text, "new"), "new") == placed(text, "new")


def test_a_readme_without_markers_is_an_error() -> None:
    with pytest.raises(DiagnosticsError, match="needs one"):
        placed("no markers", "new")


def test_a_section_becomes_a_table_of_markdown() -> None:
    region = markdown([Section("Title", "Words.", ("a", "b"), [("1", "2")])])
    assert region == "**Title.** Words.\n\n| a | b |\n|---|---|\n| 1 | 2 |"


def test_the_hash_follows_the_tables_and_the_detectors(tmp_path: Path) -> None:
    (tmp_path / "diagnostics" / "detect").mkdir(parents=True)
    source = tmp_path / "diagnostics" / "detect" / "alarm.py"
    source.write_text("a", encoding="utf-8")
    before = inputs_hash(tmp_path)
    assert inputs_hash(tmp_path) == before
    source.write_text("b", encoding="utf-8")
    assert inputs_hash(tmp_path) != before
