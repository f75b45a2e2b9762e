"""A run without a partition, over all targets: the whole plan once for each, as if it were the run of that target alone.

Dagster gives no way to it: a partitioned asset that has been seen before cannot be an input of a run without a partition, and in
one run over a range a target that fails keeps all the others from their next step.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg
from dagster._core.events import EngineEventData
from dagster._core.execution.api import ExecuteRunWithPlanIterable
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.context_creation_job import PlanExecutionContextManager
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.execution.step_dependency_config import StepDependencyConfig
from dagster._core.executor.in_process import InProcessExecutor, inprocess_execution_iterator
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_START_TAG, PARTITION_NAME_TAG


class EachTarget(InProcessExecutor):
    """Steps of one target that fail leave the others their turn, and fail the run at its end."""

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        tags = plan_context.dagster_run.tags
        partitions = plan_context.job.get_definition().partitions_def
        if PARTITION_NAME_TAG in tags or ASSET_PARTITION_RANGE_START_TAG in tags or partitions is None:
            yield from super().execute(plan_context, execution_plan)
            return
        keys = partitions.get_partition_keys()
        if not keys:
            raise dg.DagsterInvariantViolationError(
                "the inventory has no target: nothing would be done, and nothing proven"
            )
        for key in keys:
            yield dg.DagsterEvent.engine_event(plan_context, f"the steps of {key}", EngineEventData())
            yield from self._of_one(plan_context, key)

    def _of_one(self, plan_context: PlanOrchestrationContext, key: str) -> Iterator[dg.DagsterEvent]:
        yield from iter(
            ExecuteRunWithPlanIterable(
                execution_plan=plan_context.execution_plan,
                iterator=inprocess_execution_iterator,
                execution_context_manager=PlanExecutionContextManager(
                    job=plan_context.job,
                    retry_mode=plan_context.retry_mode,
                    execution_plan=plan_context.execution_plan,
                    run_config=plan_context.run_config,
                    dagster_run=plan_context.dagster_run.with_tags(
                        {**plan_context.dagster_run.tags, PARTITION_NAME_TAG: key}
                    ),
                    instance=plan_context.instance,
                    raise_on_error=plan_context.raise_on_error,
                    output_capture=plan_context.output_capture,
                    step_dependency_config=self.step_dependency_config,
                ),
            )
        )


@dg.executor(name="each_target")
def each_target(_init: Any) -> EachTarget:
    """In this process; a run without a partition works through the targets one after the other."""
    return EachTarget(RetryMode.ENABLED, StepDependencyConfig.default())
