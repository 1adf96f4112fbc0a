"""Telling the user what is no fault: through logging where that is set up, else on stderr."""

import logging
import sys

_LOG = logging.getLogger("diagnostics")


def tell(message: str) -> None:
    """Says it at INFO."""
    if _LOG.hasHandlers():
        _LOG.info(message)
    else:
        print(f"diagnostics: {message}", file=sys.stderr)
