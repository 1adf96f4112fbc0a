"""Which steps are measured: 0, every, 2 every, ...; pure functions of the step."""


def is_measured(step: int, every: int) -> bool:
    return step % every == 0


def next_measured(step: int, every: int) -> int:
    """The first measured step after `step`."""
    return (step // every + 1) * every
