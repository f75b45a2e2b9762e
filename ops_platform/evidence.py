"""Evidence for auditors: puts together the ledger, its checkpoints and the cover that people read."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ops_platform.errors import UsageError
from ops_platform.inventory.evidence import Control, controls
from ops_platform.ledger.pack import Cover

if TYPE_CHECKING:
    from ops_platform.clients.access import Access


def chosen(access: Access, number: str, framework: str | None = None) -> Control:
    """The control of that number. Raises UsageError; where several frameworks have it, it asks for one."""
    from difflib import get_close_matches

    known = controls(access.inventory.evidence)
    fitting = [each for each in known if each.id == number and framework in (None, each.framework)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(each.framework for each in fitting)
        raise UsageError(f"several frameworks have a control {number}: {names}", remedy="name one with --framework")
    near = get_close_matches(number, [each.id for each in known], n=3)
    raise UsageError(
        f"there is no control {number!r}" + (f" of {framework}" if framework else ""),
        remedy=f"did you mean {', '.join(near)}?" if near else "ops evidence controls lists them",
    )


def export(
    access: Access, control: Control, since: datetime, until: datetime, path: Path, *, whole: bool, made_by: str
) -> Cover:
    """Write the pack. Raises UsageError for a time that ends before it begins and where a file is there, and what `write_pack` raises."""
    from ops_platform.ledger.anchored import open_anchored
    from ops_platform.ledger.pack import write_pack
    from ops_platform.reports.evidence import evidence_cover

    if since >= until:
        raise UsageError("the time ends before it begins", remedy="--from is the earlier one")
    if os.path.lexists(path):
        raise UsageError(
            "this file exists", where=str(path), remedy="name another one with --output; nothing is overwritten"
        )
    with open_anchored(access) as anchored:
        return write_pack(path, anchored, control, since, until, whole=whole, made_by=made_by, cover=evidence_cover)
