"""The command line: `python -m continuous_lm` lists the programs, `... NAME --flags` runs one."""

import difflib
import importlib
import sys

from continuous_lm.experiments import GROUPS, PROGRAMS
from continuous_lm.experiments.common import program


def overview() -> str:
    """Every program by group, one line each."""
    width = max(map(len, PROGRAMS))
    lines = ["usage: python -m continuous_lm PROGRAM [--flags]", ""]
    for group, programs in GROUPS.items():
        lines += [
            group,
            *(f"  {name:{width}}  {p.summary}" for name, p in programs.items()),
            "",
        ]
    lines.append("python -m continuous_lm PROGRAM --help lists the flags of a program.")
    return "\n".join(lines)


def main() -> None:
    """Run the program that the first argument names; without one, list all programs."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "--helpfull", "help"):
        print(overview())
        return
    name, *flags = arguments
    name = name.replace("-", "_")
    if name not in PROGRAMS:
        close = difflib.get_close_matches(name, PROGRAMS, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        sys.exit(
            f"error: {arguments[0]!r} is not a program{hint}"
            " (python -m continuous_lm lists all programs)"
        )
    module = importlib.import_module(
        f"continuous_lm.experiments.{PROGRAMS[name].module}"
    )
    program.main(module.Config, module.run, [name, *flags])


if __name__ == "__main__":
    main()
