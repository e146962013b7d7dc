"""Several commands in one process of their own, which takes seconds to import everything once.

usage: python commands_in_a_row.py '[["plan_and_preprocess", "--root", "folder"], ...]'

Writes a line SEPARATOR after each; ends with the first exit code that is not 0.
"""

from __future__ import annotations

import json
import os
import sys

from rfmedsam2.cli import data_and_models, pipeline

SEPARATOR = "-- end of a command --"


def main() -> None:
    """Run them with the words that a shell would have given them."""
    for name, *words in json.loads(sys.argv[1]):
        # bytes become text as Python does it for the arguments of a process, whatever the locale
        sys.argv = [f"rfmed_{name}", *(os.fsdecode(word.encode()) for word in words)]
        entry = getattr(pipeline, f"{name}_command", None) or getattr(data_and_models, f"{name}_command")
        try:
            entry()
        except SystemExit as end:
            if end.code:
                raise
        sys.stdout.write(f"{SEPARATOR}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
