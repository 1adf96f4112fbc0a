import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.detect.alarm import Alarm


def seen(alarm: Alarm, pattern: str) -> list[int]:
    """Steps at which the alarm is raised, for a pattern of frames: x holds, . does not."""
    return [step for step, mark in enumerate(pattern) if alarm.see(step, start=mark == "x")]


def test_one_odd_frame_is_no_alarm() -> None:
    assert seen(Alarm(needed=2), "..x..x..x") == []


def test_an_alarm_is_raised_once_and_dated_where_its_condition_began() -> None:
    alarm = Alarm(needed=3)
    assert seen(alarm, "..xxxxx") == [4]
    assert alarm.onset == 2


def test_an_alarm_is_cleared_only_after_calm_frames_in_a_row_and_can_be_raised_again() -> None:
    alarm = Alarm(needed=2, calm=3)
    assert seen(alarm, "xx..x...") == [1]
    assert not alarm.active
    assert seen(alarm, "xx") == [1]


def test_a_weaker_condition_keeps_an_active_alarm_up_but_raises_none() -> None:
    alarm = Alarm(needed=1, calm=1)
    assert not alarm.see(0, start=False, stay=True)
    assert alarm.see(1, start=True, stay=True)
    alarm.see(2, start=False, stay=True)
    assert alarm.active
    alarm.see(3, start=False, stay=False)
    assert not alarm.active


def test_the_state_of_an_alarm_survives_a_restart() -> None:
    first = Alarm(needed=3, calm=2)
    seen(first, "xx")
    second = Alarm(needed=3, calm=2)
    second.load_state_dict(first.state_dict())
    assert second.see(2, start=True)
    assert second.onset == 0


def test_a_cleared_alarm_is_not_raised_again_within_the_pause() -> None:
    alarm = Alarm(needed=1, calm=1, refractory=4)
    assert seen(alarm, "x.xxxxxx") == [0, 6]


def test_frames_that_could_not_be_judged_change_nothing() -> None:
    alarm = Alarm(needed=2, calm=2)
    start = np.array([True, False, True, False, False, False])
    known = np.array([True, False, True, False, True, True])
    turns = list(alarm.run(np.arange(6) * 10, start, start, known))
    assert [(turn.frame, turn.raised, turn.onset) for turn in turns] == [(2, True, 0), (5, False, 0)]


marks = st.lists(st.sampled_from("x.?-"), min_size=1, max_size=40)


@given(marks, st.integers(1, 3), st.integers(1, 3), st.integers(0, 6), st.integers(0, 39))
def test_a_run_of_frames_is_seen_as_frame_by_frame(
    pattern: list[str], needed: int, calm: int, refractory: int, cut: int
) -> None:
    """x starts, ? only keeps an alarm up, - was not judged; the run may be cut in two anywhere."""
    steps = np.arange(len(pattern))
    start, stay = (np.array([mark in kept for mark in pattern]) for kept in ("x", "x?"))
    known = np.array([mark != "-" for mark in pattern])
    whole = Alarm(needed=needed, calm=calm, refractory=refractory)
    turns = [
        (turn.frame + first, turn.raised, turn.onset)
        for first, last in ((0, cut), (cut, len(pattern)))
        for turn in whole.run(steps[first:last], start[first:last], stay[first:last], known[first:last])
    ]
    single, expected = Alarm(needed=needed, calm=calm, refractory=refractory), []
    for step in steps[known].tolist():
        was = single.onset
        if single.see(step, start=bool(start[step]), stay=bool(stay[step])):
            expected.append((step, True, single.onset))
        elif was is not None and not single.active:
            expected.append((step, False, was))
    assert turns == expected
