"""Whole tables of short runs, read once and then followed: what is new is added, what a new attempt voids is dropped."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from diagnostics.store.coarse.tables import KEYS
from diagnostics.store.format import SCHEMAS
from diagnostics.store.read import Run
from diagnostics.store.reading.cursor import Cursor

# The long column of the widest table is read only for the head that is looked at.
_LIGHT_COLUMNS = {"spectra": [name for name in SCHEMAS["spectra"].names if name != "singular_values"]}


@dataclass
class _Followed:
    birth: tuple[Any, ...]
    run: Run
    cursor: Cursor
    frame: pd.DataFrame


class Following:
    """Follows tables, one thread at a time; frames that are handed out must not be changed.

    Args:
        most: tables followed at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._followed: OrderedDict[tuple[str, str], _Followed] = OrderedDict()

    def __len__(self) -> int:
        return len(self._followed)

    def table(self, run: Run, info: Mapping[str, Any], name: str) -> tuple[pd.DataFrame, Run]:
        """A table as it stands now, the same frame as before where nothing is new, and who knows of its damage.

        Args:
            run: the run.
            info: its manifest.
            name: of the table.
        """
        key = (os.fspath(run.path), name)
        followed = self._followed.get(key)
        if followed is None or followed.birth != birth(info):
            cursor = run.follow(name, _LIGHT_COLUMNS.get(name))
            followed = _Followed(birth(info), run, cursor, as_frame(name, cursor.read().rows))
            self._followed[key] = followed
        else:
            _advance(name, followed)
        self._followed.move_to_end(key)
        while len(self._followed) > self._most:
            self._followed.popitem(last=False)
        return followed.frame, followed.run

    def adopt(self, other: "Following") -> None:
        """Takes over the tables of another one that are not followed here."""
        for key, followed in other._followed.items():  # noqa: SLF001 - one of its own kind
            self._followed.setdefault(key, followed)


def birth(info: Mapping[str, Any]) -> tuple[Any, ...]:
    """Tells a run from one that was recorded anew at the same path, and may repeat its part names."""
    return info.get("run_id"), info.get("started_s")


def as_frame(name: str, table: pa.Table) -> pd.DataFrame:
    """Arrow rows of a table as pages use them: `steps` has `loss_not_finite` besides, NaN apart from null."""
    frame: pd.DataFrame = table.to_pandas()
    if name == "steps" and "loss" in table.column_names:
        loss = table.column("loss")
        frame["loss_not_finite"] = pc.and_(pc.is_valid(loss), pc.invert(pc.is_finite(loss))).fill_null(False)
    return frame


def _advance(name: str, followed: _Followed) -> None:
    news = followed.cursor.read()
    frame = followed.frame
    if news.replaces_from is not None:
        frame = frame[frame["step"] < news.replaces_from]
    if news.rows.num_rows:
        new = as_frame(name, news.rows)
        in_order = frame.empty or int(new["step"].iloc[0]) > int(frame["step"].iloc[-1])
        frame = pd.concat([frame, new], ignore_index=True) if len(frame) else new
        if not in_order:
            frame = frame.sort_values(["step", *KEYS.get(name, ())], kind="stable", ignore_index=True)
    followed.frame = frame
