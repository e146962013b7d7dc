"""Flags that several groups and commands of the image wing share."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from segment_anything_hq import choices

MaskRule = Annotated[
    choices.MaskRule | None,
    arg(
        metavar="RULE",
        help="How mask values in folders are interpreted: above_128 (default), ignore_128 (128 is ignored) or any (all "
        "but 0). Collections have their own rules.",
    ),
]
