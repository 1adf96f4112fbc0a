"""The tail's bytes: what is put in comes out, and what a kill or a disk does to them costs no more than it must."""

import json
import math
import struct
import zlib
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.store.format import SCHEMAS
from diagnostics.store.tail.decode import read_generation, read_steps, read_tables, steps_table
from diagnostics.store.tail.frames import (
    MAGIC,
    NULL,
    PENDING,
    SEGMENT_BYTES,
    names_frame,
    step_struct,
    table_frame,
)
from diagnostics.store.tail.frames import frame as framed
from diagnostics.store.tail.name import TailName


def step_frame(
    step: int, *doubles: float, names: int = 0, loss: float = 1.0, lr: float = 0.1, measured: bool = False
) -> bytes:
    packed = step_struct(len(doubles)).pack(
        ord("S"), step, 1.5e9 + step, 1e-6, measured, names, loss, lr, *doubles
    )
    return framed(packed)


def segment(*frames: bytes, size: int = SEGMENT_BYTES) -> bytes:
    return (MAGIC + b"".join(frames)).ljust(size, b"\0")


def event(step: int) -> pa.Table:
    row = {"step": step, "time_s": 1.0, "kind": "alert", "severity": "info", "layer": None, "head": None}
    return pa.Table.from_pylist([row | {"message": "m", "data": "{}"}], schema=SCHEMAS["events"])


NO_NAMES = names_frame(0, [])


def test_a_frame_is_its_length_its_crc32_and_its_payload_in_little_endian() -> None:
    payload = b"Nothing"
    assert framed(payload) == struct.pack("<II", 7, zlib.crc32(payload)) + payload


def test_a_step_record_lies_in_the_file_as_the_format_says() -> None:
    # Packed by hand, as a reader in another language would find it.
    values = struct.pack("<cqddBHddd", b"S", 7, 2.5, 3e-6, 1, 4, 0.25, 1e-3, -8.0)
    names = b"N" + json.dumps({"id": 4, "names": ["grad_norm"]}).encode()
    data = MAGIC + b"".join(struct.pack("<II", len(one), zlib.crc32(one)) + one for one in (names, values))
    assert read_steps(data).rows == [
        {
            "step": 7,
            "time_s": 2.5,
            "loss": 0.25,
            "lr": 1e-3,
            "measured": True,
            "overhead_s": 3e-6,
            "grad_norm": -8.0,
        }
    ]


doubles = st.floats(allow_nan=True, allow_infinity=True) | st.none()
# The recorder refuses a scalar of the name of a column.
scalar_names = st.text().filter(lambda name: name not in SCHEMAS["steps"].names)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**62), doubles, doubles, st.booleans(), st.dictionaries(scalar_names, doubles)
        ),
        max_size=8,
    )
)
def test_steps_come_out_as_they_went_in(steps: list[Any]) -> None:
    frames = []
    for number, (step, loss, lr, measured, scalars) in enumerate(steps):
        values = [NULL if value is None else value for value in scalars.values()]
        frames.append(names_frame(number, list(scalars)))
        frames.append(
            step_frame(
                step,
                *values,
                names=number,
                loss=NULL if loss is None else loss,
                lr=NULL if lr is None else lr,
                measured=measured,
            )
        )
    found = read_steps(segment(*frames))
    assert found.damage == []
    assert found.pending == set()
    assert len(found.rows) == len(steps)
    for row, (step, loss, lr, measured, scalars) in zip(found.rows, steps, strict=True):
        assert (row["step"], row["measured"]) == (step, measured)
        for name, value in {"loss": loss, "lr": lr, **scalars}.items():
            assert (
                row[name] is None
                if value is None
                else struct.pack("<d", row[name]) == struct.pack("<d", value)
            )


def test_a_loss_that_is_nan_is_told_from_none_and_from_one_that_is_not_there_yet() -> None:
    found = read_steps(
        segment(
            names_frame(0, ["a"]),
            step_frame(0, math.nan, loss=math.inf),
            step_frame(1, NULL, loss=-math.nan),
            step_frame(2, 1.0, loss=NULL),
            step_frame(3, PENDING, loss=2.0),
        )
    )
    losses = [row["loss"] for row in found.rows]
    assert losses[0] == math.inf
    assert math.isnan(losses[1])
    assert losses[2:] == [None, 2.0]
    assert math.isnan(found.rows[0]["a"])
    assert [row["a"] for row in found.rows[1:]] == [None, 1.0, None]
    assert found.pending == {3}


def test_each_set_of_scalars_keeps_its_own_names() -> None:
    found = read_steps(
        segment(
            names_frame(0, ["a", "b"]),
            step_frame(0, 1.0, 2.0),
            names_frame(1, ["b"]),
            step_frame(1, 3.0, names=1),
            step_frame(2, 4.0, 5.0),
        )
    )
    columns = ("time_s", "loss", "lr", "measured", "overhead_s")
    rows = [{name: value for name, value in row.items() if name not in columns} for row in found.rows]
    assert rows == [{"step": 0, "a": 1.0, "b": 2.0}, {"step": 1, "b": 3.0}, {"step": 2, "a": 4.0, "b": 5.0}]


@pytest.mark.parametrize("data", [b"", MAGIC[:3], bytes(100), MAGIC, MAGIC + bytes(100)], ids=repr)
def test_a_file_that_was_only_begun_holds_nothing_and_is_not_damaged(data: bytes) -> None:
    assert (read_steps(data).rows, read_steps(data).damage) == ([], [])
    assert (read_tables(data).batches, read_tables(data).damage) == ([], [])


def test_a_torn_record_at_the_end_is_passed_over_wherever_it_is_torn() -> None:
    whole = MAGIC + NO_NAMES + step_frame(0) + step_frame(1)
    last = len(step_frame(1))
    for missing in range(1, last):
        for data in (
            whole[:-missing],
            whole[:-missing] + bytes(missing + 50),
        ):
            found = read_steps(data)
            assert [row["step"] for row in found.rows] == [0]
            assert found.damage == []
            assert found.end == len(whole) - last


@pytest.mark.parametrize("where", [0, 4, 8, 20, 40])
def test_a_bad_record_before_a_good_one_is_damage_and_costs_only_itself(where: int) -> None:
    """Whichever of length, checksum or payload is hit."""
    data = bytearray(segment(NO_NAMES, step_frame(0), step_frame(1), step_frame(2), step_frame(3)))
    data[len(MAGIC) + len(NO_NAMES) + len(step_frame(0)) + where] ^= 0xFF
    found = read_steps(bytes(data))
    assert [row["step"] for row in found.rows] == [0, 2, 3]
    assert len(found.damage) == 1
    assert f"{len(step_frame(1))} bytes at" in found.damage[0]


def test_zeros_before_a_good_record_are_damage_as_after_a_power_cut() -> None:
    frames = [step_frame(step) for step in range(4)]
    found = read_steps(segment(NO_NAMES, frames[0], bytes(len(frames[1])), frames[2], frames[3]))
    assert [row["step"] for row in found.rows] == [0, 2, 3]
    assert len(found.damage) == 1


def test_a_file_whose_beginning_was_overwritten_gives_what_comes_after() -> None:
    data = bytearray(segment(NO_NAMES, step_frame(0), step_frame(1)))
    data[:8] = b"\x01" * 8
    found = read_steps(bytes(data))
    assert [row["step"] for row in found.rows] == [0, 1]
    assert found.damage == ["the file does not begin as a tail file does"]


def test_scalars_whose_names_were_lost_are_damage_but_the_step_and_its_loss_are_not() -> None:
    found = read_steps(segment(names_frame(0, ["a"]), step_frame(0, 1.0), step_frame(1, 2.0, names=9)))
    assert [(row["step"], row["loss"]) for row in found.rows] == [(0, 1.0), (1, 1.0)]
    assert found.damage == ["the scalars of step 1, whose names are not declared"]


@given(st.binary(max_size=400), st.integers(0, 400))
def test_no_bytes_make_reading_fail(noise: bytes, where: int) -> None:
    data = segment(NO_NAMES, step_frame(0), table_frame("events", event(1)), step_frame(2), size=0)
    spoiled = data[:where] + noise + data[where + len(noise) :]
    for bytes_read in (noise, MAGIC + noise, spoiled):
        read_steps(bytes_read)
        read_tables(bytes_read)


def test_rows_come_out_with_the_columns_that_the_format_describes() -> None:
    spectra = pa.Table.from_pylist(
        [{"step": 3, "layer": "a", "head": 1, "sigma1": 2.0, "singular_values": [2.0, None, math.inf]}],
        schema=SCHEMAS["spectra"],
    )
    found = read_tables(MAGIC + table_frame("spectra", spectra) + table_frame("events", event(4)))
    assert [name for name, _ in found.batches] == ["spectra", "events"]
    assert found.batches[0][1].equals(spectra, check_metadata=True)
    assert found.batches[1][1].equals(event(4), check_metadata=True)
    assert found.damage == []


def test_rows_of_several_batches_are_one_frame() -> None:
    several = pa.concat_tables([event(1), event(2)])
    found = read_tables(MAGIC + table_frame("events", several))
    assert [(name, batch.column("step").to_pylist()) for name, batch in found.batches] == [("events", [1, 2])]


def test_a_rows_log_is_read_on_from_where_it_ended() -> None:
    first, second = table_frame("events", event(1)), table_frame("events", event(2))
    begun = read_tables(MAGIC + first + second[:30])
    assert begun.end == len(MAGIC) + len(first)
    rest = read_tables((MAGIC + first + second)[begun.end :], whole=False)
    assert [batch.column("step").to_pylist() for _, batch in rest.batches] == [[2]]
    assert begun.end + rest.end == len(MAGIC + first + second)


def test_a_frame_of_rows_that_was_hit_is_named_and_the_next_is_read() -> None:
    frames = [table_frame("events", event(step)) for step in range(3)]
    data = bytearray(MAGIC + b"".join(frames))
    data[len(MAGIC) + len(frames[0]) + 100] ^= 1
    found = read_tables(bytes(data))
    assert [batch.column("step").to_pylist() for _, batch in found.batches] == [[0], [2]]
    assert len(found.damage) == 1


def test_rows_of_an_unknown_table_are_named() -> None:
    found = read_tables(MAGIC + table_frame("gradients", event(1)) + table_frame("events", event(2)))
    assert [name for name, _ in found.batches] == ["events"]
    assert found.damage == ["rows of a table 'gradients', which there is not"]


def test_steps_that_were_completed_later_replace_what_was_pending() -> None:
    segments = [
        segment(names_frame(0, ["a"]), step_frame(0, PENDING), step_frame(1, 5.0)),
        segment(names_frame(0, ["a"]), step_frame(2, PENDING)),
    ]
    complete = {"step": 0, "time_s": 1.0, "loss": 9.0, "lr": None, "grad_norm": None, "measured": False}
    log = MAGIC + table_frame("steps", steps_table([complete | {"overhead_s": 0.0, "a": 4.0}], ["a"]))
    found = read_generation(segments, log)
    assert found.tables["steps"].select(["step", "loss", "a"]).to_pylist() == [
        {"step": 0, "loss": 9.0, "a": 4.0},
        {"step": 1, "loss": 1.0, "a": 5.0},
        {"step": 2, "loss": 1.0, "a": None},
    ]
    assert found.pending == {2}
    assert found.damage == []


def test_a_generation_without_rows_has_no_tables() -> None:
    assert read_generation([segment()], MAGIC).tables == {}


def test_a_steps_table_tells_nan_from_null_and_keeps_the_contracts_columns_first() -> None:
    table = steps_table([{"step": 1, "loss": math.nan, "b": 1.0}, {"step": 2, "a": 2.0}], ["b", "a"])
    assert table.column_names == [*SCHEMAS["steps"].names, "b", "a"]
    assert table.column("loss").null_count == 1
    assert math.isnan(table.column("loss").to_pylist()[0])
    assert table.column("b").to_pylist() == [1.0, None]
    assert table.schema.field("loss").metadata == SCHEMAS["steps"].field("loss").metadata


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (TailName("steps", 7), "steps-000007-0000.log"),
        (TailName("steps", 7, 2, 3, 12), "steps-000007a2r3-0012.log"),
        (TailName("rows", 1234567), "rows-1234567.log"),
        (TailName("rows", 0, 2), "rows-000000a2.log"),
        (TailName("rows", 0, 1, 5), "rows-000000r5.log"),
    ],
)
def test_a_tail_files_name_says_what_it_holds_and_reads_back(name: TailName, text: str) -> None:
    assert str(name) == text
    assert TailName.parse(text) == name


@pytest.mark.parametrize(
    "text", ["steps-000001.log", "rows-000001-0000.log", ".writer-0.lock", "rows-1.log.tmp", "rows-x.log"]
)
def test_other_files_names_are_not_taken_for_tail_files(text: str) -> None:
    assert TailName.parse(text) is None
