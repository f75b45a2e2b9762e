"""A job for each declared drill, with an op for each of its steps: what Dagster retries is a step, and what it shows is the runbook's graph.

Nothing of a drill lives in Dagster: each op takes one step in the platform's database, whatever process it runs in. An op that fails with
all its retries ends the drill, and so does whoever finds it dead: `sweep_drills`.
"""

from typing import Any

import dagster as dg
from dagster import DependencyDefinition, GraphDefinition, MultiDependencyDefinition, NodeInvocation
from pydantic import Field

from assets.drills import DRILLS, NAMES
from ops_platform.drills.model import DrillCard
from ops_platform.drills.runbook import AnyStep, Runbook
from ops_platform.errors import ConflictError, OpsError
from ops_platform.inventory.drills import PlannedDrill
from ops_platform.resources import PlatformResource

BEGIN, END = "begin", "end_and_judge"
TARGET_TAG = "ops/target"


class DrillConfig(dg.Config):
    target: str = Field(default="", description="One of the drill's targets; needed where it has several.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Of the runbook, where they differ.")
    trigger: str = Field(default="by hand", description="Why it is held, for its record.")


def build_jobs(planned: list[tuple[PlannedDrill, Runbook]]) -> dict[str, Any]:
    if not planned:
        return {}
    found: dict[str, Any] = {job_name(plan.id): drill_job(plan, book) for plan, book in planned}
    checks = dg.define_asset_job(
        "check_drills",
        selection=dg.AssetSelection.checks(*(dg.AssetCheckKey(DRILLS, name) for name in NAMES)),
        description="Judge every declared drill: drilled within the time, RTO and RPO met.",
        tags={"ops/domain": "drills"},
    )
    return found | {"sweep_drills": sweep_drills, "check_drills": checks}


def job_name(plan_id: str) -> str:
    return f"drill_{plan_id.replace('-', '_')}"


def op_name(step: str) -> str:
    return f"step_{step.replace('-', '_')}"


def _in(plan: PlannedDrill, node: str) -> str:
    """The definition behind a node: in a code location no two may have one name, and each drill begins, takes steps and ends."""
    return f"{job_name(plan.id)}__{node}"


def drill_job(plan: PlannedDrill, book: Runbook) -> dg.JobDefinition:
    steps = [step for step in book.steps_for("drill") if step.kind != "teardown"]
    dependencies: dict[Any, Any] = {}
    for step in steps:
        before = [DependencyDefinition(op_name(need)) for need in sorted(book.needs_of(step, "drill"))]
        node = op_name(step.id)
        dependencies[NodeInvocation(_in(plan, node), alias=node)] = {
            "drill": DependencyDefinition(BEGIN),
            **({"after": MultiDependencyDefinition(before)} if before else {}),
        }
    everything = [DependencyDefinition(op_name(step.id)) for step in steps]
    dependencies[NodeInvocation(_in(plan, BEGIN), alias=BEGIN)] = {}
    dependencies[NodeInvocation(_in(plan, END), alias=END)] = {
        "drill": DependencyDefinition(BEGIN), "after": MultiDependencyDefinition(everything),
    }  # fmt: skip
    graph = GraphDefinition(
        name=job_name(plan.id),
        description=f"{book.title}. {book.description}",
        node_defs=[_begin(plan), *(_step(plan, step) for step in steps), _end(plan)],
        dependencies=dependencies,
    )
    tags = {"ops/domain": "drills", "ops/drill": plan.id}
    return graph.to_job(hooks={tear_down}, tags=tags)


def _begin(plan: PlannedDrill) -> dg.OpDefinition:
    @dg.op(
        name=_in(plan, BEGIN),
        description="Plan, guards, approval, claim. A refusal fails the run, and nothing was touched.",
    )
    def begin(context: dg.OpExecutionContext, config: DrillConfig, platform: PlatformResource) -> str:
        from ops_platform.drilling import open_store
        from ops_platform.drills.begin import Beginner, planned

        actor = run_actor(context.run_id)
        with platform.access() as access, open_store(access) as store:
            request = planned(
                access, plan.id, config.target or None, config.parameters, operator=actor, trigger=config.trigger
            )
            begun = Beginner(access, store).begin(request)
        for ruling in begun.result.rulings:
            context.log.info(f"{'allows' if ruling.allows else 'REFUSES'} {ruling.guard}: {ruling.reason}")
        if begun.drill is None:
            said = "; ".join(f"{r.guard}: {r.reason}" for r in begun.result.rulings if not r.allows)
            raise dg.Failure(said or begun.result.status.value, allow_retries=False)
        context.add_output_metadata({"drill": begun.drill.id, "plan": begun.result.plan.digest})
        return begun.drill.id

    return begin


def _step(plan: PlannedDrill, step: AnyStep) -> dg.OpDefinition:
    delay = step.retry_after.total_seconds()
    policy = dg.RetryPolicy(max_retries=step.retries, delay=delay) if step.retries else None

    @dg.op(
        name=_in(plan, op_name(step.id)),
        description=f"{step.kind}: {step.name} ({step.does})",
        ins={"drill": dg.In(str), "after": dg.In(dg.Nothing)},
        out=dg.Out(dg.Nothing),
        retry_policy=policy,
    )
    def take(context: dg.OpExecutionContext, platform: PlatformResource, drill: str) -> None:
        from ops_platform.drilling import open_store
        from ops_platform.drills.engine import Engine, StepFailedError

        with platform.access() as access, open_store(access) as store:
            try:
                record = Engine(access, store, run_actor(context.run_id)).step(drill, step.id)
            except StepFailedError as error:
                # The op fails where nothing may come after the step; where the others have their turn, its record says it.
                if step.on_failure == "abort" or context.retry_number < step.retries:
                    raise dg.Failure(str(error)) from None
                context.log.error(str(error))
                return
            except OpsError as error:
                raise dg.Failure(str(error), allow_retries=False) from None
        context.log.info(f"{record.state.value}: {record.said}")
        context.add_output_metadata({"said": record.said, "seconds": record.seconds or 0.0})

    return take


def _end(plan: PlannedDrill) -> dg.OpDefinition:
    @dg.op(
        name=_in(plan, END),
        description="Take away what was made, put back what was broken, look whether it is gone; judge, and write the page.",
        ins={"drill": dg.In(str), "after": dg.In(dg.Nothing)},
    )
    def end(context: dg.OpExecutionContext, platform: PlatformResource, drill: str) -> None:
        from ops_platform.drilling import open_store, write_reports
        from ops_platform.drills.engine import Engine
        from ops_platform.drills.model import Ending, StepState
        from ops_platform.drills.scorecard import card_of

        with platform.access() as access, open_store(access) as store:
            failed = [r for r in store.steps(drill).values() if r.state is StepState.FAILED]
            ending = Ending.FAILED if failed else Ending.COMPLETED
            reason = f"the step {failed[0].step} failed: {failed[0].said}" if failed else "all steps were taken"
            held = Engine(access, store, run_actor(context.run_id)).end(drill, ending, reason)
            page = write_reports(access, store, held)
        card = card_of(held)
        said = card.reason if card else ""
        metadata = {"verdict": held.verdict or "", "why": said, "report": dg.MetadataValue.path(str(page))}
        if card is not None:
            metadata |= card_metadata(card)
        context.log_event(dg.AssetObservation(DRILLS, metadata=metadata))
        context.add_output_metadata(metadata)
        if held.verdict != "PASS":
            raise dg.Failure(f"{held.verdict}: {said}", allow_retries=False)

    return end


def card_metadata(card: DrillCard) -> dict[str, Any]:
    """What a person looks at in the web UI: the drill in one picture, its numbers as plots."""
    from ops_platform.reports.pictures import as_markdown, drill_picture

    measured = {f"{m.name} seconds" if m.unit == "s" else m.name: m.value for m in card.measured if m.value is not None}
    return {
        "drill": card.drill,
        "target": card.target,
        "scenario": card.scenario,
        "steps": dg.MetadataValue.md(as_markdown(drill_picture(card), f"{card.title}, step by step")),
        "findings": len(card.findings),
        **measured,
    }


@dg.failure_hook(required_resource_keys={"platform"})
def tear_down(context: dg.HookContext) -> None:
    """An op failed for good: what the drill broke is put back now, not when somebody finds it."""
    from ops_platform.drilling import open_store, write_reports
    from ops_platform.drills.engine import Engine
    from ops_platform.drills.model import Ending

    actor = run_actor(context.run_id)
    with context.resources.platform.access() as access, open_store(access) as store:
        for drill in store.list(ended=False):
            if drill.operator == actor:
                reason = f"the op {context.op.name} failed: {context.op_exception}"
                write_reports(access, store, Engine(access, store, actor).end(drill.id, Ending.FAILED, reason))


@dg.op(description="End drills whose worker died, and take away what they left on this machine.")
def sweep(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    from ops_platform.drilling import open_store
    from ops_platform.drills.engine import Engine

    with platform.access() as access, open_store(access) as store:
        try:
            done = Engine(access, store, run_actor(context.run_id)).sweep()
        except ConflictError as error:
            context.log.info(f"left alone: {error}")
            return
    context.log.info(", ".join(drill.id for drill in done) or "nothing was left")


@dg.job(description="End drills whose worker died.", tags={"ops/domain": "drills"})
def sweep_drills() -> None:
    sweep()


def run_actor(run_id: str) -> str:
    return f"dagster run {run_id}"
