"""The files of a program: its numbers as JSON, its figures, its texts, written as one."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from continuous_lm.experiments.common import plots, program
from continuous_lm.experiments.common.tables import Table
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json


def write(
    config: program.RunConfig,
    folder: pathlib.Path,
    name: str,
    values: Mapping[str, Any],
    figures: Mapping[str, Figure] | None = None,
    texts: Mapping[str, str] | None = None,
    tables: Sequence[Table] = (),
    stale_pattern: re.Pattern[str] | None = None,
) -> None:
    """Write all files of a run, or none if one cannot be written.

    Args:
      config: config of the run, for its record.
      folder: output folder.
      name: name of the JSON file, without suffix.
      values: contents of the JSON file, besides the record of the run.
      figures: file name without suffix -> figure.
      texts: file name -> content.
      tables: tables, written as CSV, Markdown and LaTeX.
      stale_pattern: files of an earlier run to delete if they are not written now.
    """
    with write_atomically(folder, stale_pattern=stale_pattern) as staging_folder:
        for figure_name, figure in (figures or {}).items():
            plots.save(figure, staging_folder, figure_name)
        for file_name, text in (texts or {}).items():
            (staging_folder / file_name).write_text(text, encoding="utf-8")
        for table in tables:
            table.write(staging_folder)
        values_with_record = {**values, "run": program.record(config)}
        write_json(staging_folder / f"{name}.json", values_with_record)
