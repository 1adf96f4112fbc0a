"""Manifests of older schema versions, brought up to the current one in memory; files on disk stay as they are.

Each step leads from one version to the next, so that a manifest of any age takes all of them in turn.
"""

from collections.abc import Callable
from typing import Any

from diagnostics.store.format import SCHEMA_VERSION

Manifest = dict[str, Any]

OF_AN_ATTEMPT = ("started_s", "ended_s", "state", "error", "pid", "host", "every", "config")
"""Entries of a manifest that an attempt at the run has of its own; `first_step` is the one beside them."""


def migrate(manifest: Manifest) -> Manifest:
    """The manifest as the current version writes it.

    Args:
        manifest: of version 1 up to the current one; it is not changed.
    """
    migrated = dict(manifest)
    while migrated["schema_version"] < SCHEMA_VERSION:
        version = int(migrated["schema_version"])
        migrated = {**STEPS[version](migrated), "schema_version": version + 1}
    return migrated


def attempts_from_one(manifest: Manifest) -> Manifest:
    """1 to 2: a directory held one attempt, and nothing said with which step it began."""
    only = {"attempt": 1, "first_step": None, **{key: manifest.get(key) for key in OF_AN_ATTEMPT}}
    return {**manifest, "attempt": 1, "attempts": [only]}


STEPS: dict[int, Callable[[Manifest], Manifest]] = {1: attempts_from_one}
"""By the version that each leads away from."""
