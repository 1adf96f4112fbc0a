"""Makes the sample runs again: the demonstration's arms, compacted, with their findings.

    python sample_runs/make.py          # trains them
    python sample_runs/make.py runs/demo  # takes those of a demonstration that has just run

The tables are measured anew, so small differences between machines are expected; `expected.json` is what the
detectors must find in the runs as committed, and is read by tests/test_sample_runs.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from diagnostics.demo.arms import ARMS
from diagnostics.demo.main import run_demo
from diagnostics.report import assess

HERE = Path(__file__).parent
LARGEST_RUN_BYTES = 400_000


def main() -> None:
    trained = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else None
    with TemporaryDirectory() as folder:
        # Relative, because suggestions in the runs name the path as it was given.
        os.chdir(folder)
        if trained is None:
            runs = run_demo(Path("runs"))
        else:
            runs = [Path(shutil.copytree(trained / arm.name, Path("runs") / arm.name)) for arm in ARMS]
        expected = {}
        for run in runs:
            subprocess.run([sys.executable, "-m", "diagnostics", "compact", str(run)], check=True)
            _forget_the_machine(run)
            size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
            if size > LARGEST_RUN_BYTES:
                raise SystemExit(f"{run} takes {size} bytes, more than a sample should ({LARGEST_RUN_BYTES})")
            shutil.rmtree(HERE / run.name, ignore_errors=True)
            shutil.copytree(run, HERE / run.name)
            report = assess(HERE / run.name)
            expected[run.name] = {
                "status": report.status,
                "findings": [
                    {
                        key: finding.to_dict()[key]
                        for key in ("kind", "severity", "layer", "head", "first_step", "last_step")
                    }
                    for finding in report.findings
                ],
            }
        assert list(expected) == [arm.name for arm in ARMS]
        (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def _forget_the_machine(run: Path) -> None:
    path = run / "run.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest |= {"host": "sample", "pid": None}
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    (run / "control" / "inbox").rmdir()


if __name__ == "__main__":
    main()
