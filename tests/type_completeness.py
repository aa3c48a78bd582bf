"""Count the public names of the library without a type known to pyright; it may only fall.

    python -m tests.type_completeness [--write]

This runs `pyright --verifytypes` and prints its score and each name without a known type. Outside
`experiments`, which has optional packages, their number must not exceed type_completeness.json.
--write stores the number again. pyright downloads node on its first run. Without it, nothing is
checked, and a line is printed.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RECORD = pathlib.Path(__file__).with_name("type_completeness.json")
PROGRAMS = "continuous_lm.experiments."
TIMEOUT = 600  # seconds
MAX_SHOWN = 30  # names


def run_pyright(*arguments: str) -> subprocess.CompletedProcess[str] | None:
    """The finished process; None if pyright cannot run here."""
    command = [sys.executable, "-m", "pyright", *arguments]
    folder = str(pathlib.Path(sys.executable).parent)
    # It asks the `python` that it finds first where packages are.
    environment = os.environ | {"PATH": os.pathsep.join([folder, os.environ["PATH"]])}
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return None


def verify_types() -> Mapping[str, Any] | None:
    """Return pyright's report on the types of the package; None if it cannot run here."""
    version = run_pyright("--version")
    if version is None or version.returncode:
        return None
    process = run_pyright(
        "--verifytypes=continuous_lm",
        "--ignoreexternal",
        "--outputjson",
    )
    if process is None:
        return None
    return json.loads(process.stdout)["typeCompleteness"]


def unknown_names(report: Mapping[str, Any]) -> list[str]:
    """The library's public names without a known type, sorted."""
    return sorted(
        symbol["name"]
        for symbol in report["symbols"]
        if symbol["isExported"]
        and not symbol["isTypeKnown"]
        and not symbol["name"].startswith(PROGRAMS)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="store the number again")
    arguments = parser.parse_args()
    report = verify_types()
    if report is None:
        print("types: pyright cannot run here (it needs to fetch node once); skipped")
        return
    names = unknown_names(report)
    for name in names[:MAX_SHOWN]:
        print(f"no known type: {name}")
    print(
        f"types: {report['completenessScore']:.2%} of all public names have a known type;"
        f" {len(names)} of the library's have none"
    )
    if arguments.write:
        RECORD.write_text(json.dumps({"unknown": len(names)}) + "\n")
        return
    limit = json.loads(RECORD.read_text())["unknown"]
    if len(names) > limit:
        sys.exit(
            f"There were {limit}. Give the new ones annotations; what cannot have one is stored by"
            " `python -m tests.type_completeness --write`."
        )
    if len(names) < limit:
        print(f"There were {limit}: store that by --write.")


if __name__ == "__main__":
    main()
