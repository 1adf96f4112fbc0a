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
    assert alarm.just_cleared
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
