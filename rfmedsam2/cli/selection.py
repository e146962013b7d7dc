"""Commands for what follows cross-validation: the choice of a model, and postprocessing rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from rfmedsam2.cli.command import command, tell, tell_json
from rfmedsam2.cli.flags import AsJson, Workers


def postprocess(
    *,
    input_: Annotated[Path, arg(name="input", aliases=("-i",), metavar="DIR")],
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    rule: Annotated[Path, arg(metavar="FILE")],
    overwrite: bool = False,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Apply a postprocessing rule to a folder of label maps: largest components, smallest volumes, holes.

    Args:
        input_: Folder of label maps; never changed.
        output: Another folder.
        rule: The rule, such as the postprocessing.json of a model.
        overwrite: Replace also files that predictions.json does not list, or that were changed since.
    """
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.prediction.postprocessing import postprocess_folder
    from rfmedsam2.records.prediction import PostprocessingRule
    from rfmedsam2.system.atomic import read_record

    found = read_record(rule, PostprocessingRule)
    done = postprocess_folder(input_, output, found, overwrite=overwrite, workers=workers, track=bars)
    if as_json:
        cases = {case.path.name: case.changed for case in done}
        tell_json(json.dumps({"output": str(output), "rule": found.digest, "changed_voxels": cases}, indent=2))
        return
    for step in found.steps:
        tell(f"Rule: {step}")
    changed = sum(case.changed > 0 for case in done)
    tell(f"Processed {len(done)} label map(s), of which {changed} changed: {output}")


postprocess_command = command(postprocess)
