"""The one page: from the address to what is shown. `?run=NAME` a run, `?compare=A&compare=B` several, else the list."""

import sys
import warnings
from dataclasses import dataclass

import streamlit as st

from diagnostics.errors import DamagedDataWarning, DiagnosticsError
from diagnostics.store.place import is_uri, place

from . import browser, compare, run_page
from .launch import CONTROL_FLAG
from .listing import run_names


@dataclass(frozen=True)
class Settings:
    """What the server was started with."""

    root: str
    allow_control: bool


def render() -> None:
    """Draws the page; main.py's only call."""
    st.set_page_config(page_title="Training Diagnostics", page_icon="📉", layout="wide")
    # The page names damaged files itself; the server's console is not where a person looks.
    warnings.filterwarnings("ignore", category=DamagedDataWarning)
    st.html(_CSS)
    settings = _settings(sys.argv[1:])
    if settings is None:
        st.error("The dashboard was started without a directory. Start it with `diagnostics dashboard ROOT`.")
        return
    try:
        runs = run_names(settings.root)
        _route(settings, runs)
    except DiagnosticsError as error:
        st.error(str(error))


def _route(settings: Settings, runs: dict[str, str]) -> None:
    chosen = st.query_params.get("run")
    compared = st.query_params.get_all("compare")
    unknown = [name for name in ([chosen] if chosen else compared) if name not in runs]
    if unknown:
        st.error(f"There is no run {unknown[0]!r} below {settings.root} (any more).")
        chosen, compared = None, []
    single = next(iter(runs)) if list(runs.values()) == [str(place(settings.root))] else None
    if chosen or single:
        name = str(chosen or single)
        # Commands travel through a folder beside the training.
        allow_control = settings.allow_control and not is_uri(runs[name])
        run_page.render(name, runs[name], allow_control=allow_control, has_list=single is None)
    elif compared:
        compare.render(runs, compared)
    else:
        browser.render(settings.root)


def _settings(arguments: list[str]) -> Settings | None:
    roots = [word for word in arguments if word != CONTROL_FLAG]
    return Settings(roots[0], CONTROL_FLAG in arguments) if roots else None


# Streamlit leaves the top 6 rem of a page empty; a person with a dying run wants the verdict there.
_CSS = """
<style>
.block-container { padding-top: 2.2rem; padding-bottom: 3rem; }
@media (max-width: 640px) { .block-container { padding-left: 0.7rem; padding-right: 0.7rem; } }
</style>
"""
