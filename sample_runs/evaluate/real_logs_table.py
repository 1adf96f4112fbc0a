"""The figures of the logged runs alone.

python -m sample_runs.evaluate.real_logs_table                    prints the table
python -m sample_runs.evaluate.real_logs_table --real-logs PATH   of the logs in that file
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from .real_logs import REAL_LOGS, real_logs_document, real_logs_section
from .report import show


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sample_runs.evaluate.real_logs_table", description=__doc__
    )
    parser.add_argument("--real-logs", type=Path, default=REAL_LOGS, help="the logs, one run a line, gzipped")
    asked = parser.parse_args(arguments)
    show([real_logs_section(real_logs_document(asked.real_logs))], Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
