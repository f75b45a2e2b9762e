"""The job that signs what came into the ledger. Its schedule comes from the inventory: platform.ledger.schedule."""

from typing import Any

import dagster as dg

from ops_platform.errors import ConflictError
from ops_platform.resources import PlatformResource


@dg.op(description="Sign the ledger's new entries, and put the checkpoint under Object Lock.")
def write_checkpoint(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    from ops_platform.ledger.anchored import open_anchored

    with platform.access() as access, open_anchored(access) as anchored:
        try:
            made, new = anchored.write()
        except ConflictError as error:
            context.log.info(f"left alone: {error}")
            return
    if made is None:
        context.log.info("the ledger is empty")
        return
    context.log.info(f"checkpoint {made.number} {'written' if new else 'stands, nothing is new'}: {made.size} entries")
    context.add_output_metadata({"checkpoint": made.number, "entries": made.size, "root": made.root, "new": new})


@dg.job(description="Write a checkpoint of the ledger, if there are new entries.", tags={"ops/domain": "ledger"})
def ledger_checkpoint() -> None:
    write_checkpoint()


def build_jobs() -> dict[str, Any]:
    return {"ledger_checkpoint": ledger_checkpoint}
