"""Runs a Dagster job for the incident's subject, over the GraphQL API of the web server, and waits for its end.

The run carries the incident's id as a tag, and is looked for by it before another one is launched: whoever goes on after a kill finds it.
API: https://docs.dagster.io/api/graphql, as Dagster 1.13 has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ops_platform.actions import Action, Applied, Change, Check, Outcome, Plan, Verification
from ops_platform.errors import ConflictError, NotThereError, UnreachableError
from ops_platform.inventory.base import Strict
from ops_platform.inventory.values import PositiveDuration, format_duration
from ops_platform.remediation.playbook import Context, Playbook
from ops_platform.remediation.playbooks.anything.webhook import ANY_KIND

if TYPE_CHECKING:
    from ops_platform.clients.http import HttpApi

INCIDENT, SUBJECT, PARTITION = "ops/incident", "ops/subject", "dagster/partition"
_OVER = {"SUCCESS", "FAILURE", "CANCELED"}
_EVERY, _GRACE = 2.0, 60.0  # seconds

_JOBS = """
query { repositoriesOrError { __typename
  ... on RepositoryConnection { nodes { name location { name } pipelines { name } } }
  ... on PythonError { message } } }"""
_PARTITIONS = """
query($job: PipelineSelector!) { pipelineOrError(params: $job) { __typename
  ... on Pipeline { partitionKeysOrError { partitionKeys } } ... on Error { message } } }"""
_RUNS = """
query($filter: RunsFilter!) { runsOrError(filter: $filter, limit: 10) { __typename
  ... on Runs { results { runId status } }
  ... on InvalidPipelineRunsFilterError { message } ... on PythonError { message } } }"""
_RUN = "query($id: ID!) { runOrError(runId: $id) { __typename ... on Run { runId status } ... on Error { message } } }"
_LAUNCH = """
mutation($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
  ... on LaunchRunSuccess { run { runId status } }
  ... on RunConfigValidationInvalid { errors { message } }
  ... on Error { message } } }"""


class RunJobParameters(Strict):
    """Of `dagster.run_job`."""

    job: str = Field(description="Name of the job.")
    location: str | None = Field(default=None, description="Its code location, where several have a job of that name.")
    partition: str | None = Field(
        default="{subject}",
        description="Partition that is run; `{subject}` is the id of what the incident is about. null: none.",
    )
    config: dict[str, Any] = Field(
        default={}, description="Run config; it stands in the plan: no secrets, no personal data."
    )
    within: PositiveDuration = Field(
        default=timedelta(minutes=30),
        description="It must have ended by then; a run that has not goes on, and is not stopped.",
    )


@dataclass(frozen=True)
class Run:
    id: str
    status: str


class RunJobAction:
    name = "dagster.run_job"

    def __init__(self, context: Context[RunJobParameters]) -> None:
        self.context, self.parameters = context, context.parameters
        self._api: HttpApi = context.access.dagster()

    @property
    def target_id(self) -> str:
        return self.context.subject.id

    def plan(self) -> Plan:
        selector, earlier = self._selector(), self._runs()
        after = {"job": self.parameters.job, "partition": self._partition(), "config": self.parameters.config}
        change = Change("run", self._object(), None, after, reversible=False, detail=selector)
        facts = {"runs_of_this_incident": [f"{run.id}: {run.status}" for run in earlier]}
        return Plan(self.name, self.target_id, (change,), self.context.clock.now(), {"run": 1}, facts)

    def check(self, change: Change) -> Applied | None:
        if self._selector() != change.detail:
            return Applied(Outcome.CONTENDED, "the job is in another code location than when it was planned")
        done = next((run for run in self._runs() if run.status == "SUCCESS"), None)
        return Applied(Outcome.ALREADY_DONE, f"run {done.id} succeeded", {"run": done.id}) if done else None

    def apply(self, change: Change) -> Applied:
        """One that is on its way is waited for; one that failed does not keep a further attempt from being made."""
        earlier = self._runs()
        run = next((run for run in earlier if run.status not in _OVER), None) or self._launch_or_find(change, earlier)
        clock, within = self.context.clock, self.parameters.within
        deadline = clock.monotonic() + within.total_seconds()
        while run.status not in _OVER and clock.monotonic() < deadline:
            clock.sleep(_EVERY)
            with contextlib.suppress(UnreachableError):  # a web server that is restarted does not end the run
                run = self._run(run.id)
        detail = {"run": run.id, "status": run.status}
        if run.status == "SUCCESS":
            return Applied(Outcome.APPLIED, f"run {run.id} succeeded", detail)
        said = "ended with" if run.status in _OVER else f"goes on after {format_duration(within)}, as"
        return Applied(Outcome.FAILED, f"run {run.id} {said} {run.status}", detail)

    def verify(self, plan: Plan, outcomes: Mapping[str, Applied]) -> Verification:
        run_id = next((applied.detail.get("run") for applied in outcomes.values()), None)
        if run_id is None:
            return Verification((Check("run", None, "no run was launched"),))
        run = self._run(run_id)
        return Verification((Check("run", run.status == "SUCCESS", f"{run.id} is {run.status}"),))

    # Dagster

    def _selector(self) -> dict[str, str]:
        """Where the job is. Raises NotThereError (the partition included), and ConflictError where several locations have it."""
        found = self._ask(_JOBS, {}, "repositoriesOrError", "RepositoryConnection")
        wanted = self.parameters
        places = [
            {"repositoryLocationName": node["location"]["name"], "repositoryName": node["name"], "jobName": wanted.job}
            for node in found["nodes"]
            if wanted.location in (None, node["location"]["name"])
            and wanted.job in {p["name"] for p in node["pipelines"]}
        ]
        if not places:
            raise NotThereError(
                f"there is no job {wanted.job!r}", where=self._api.host, remedy="the web UI lists the jobs"
            )
        if len(places) > 1:
            names = ", ".join(place["repositoryLocationName"] for place in places)
            raise ConflictError(
                f"several have a job {wanted.job!r}: {names}", where=self._api.host, remedy="set `location`"
            )
        self._need_partition(places[0])
        return places[0]

    def _need_partition(self, place: Mapping[str, str]) -> None:
        """Dagster itself runs a job of ops for any partition that is asked for, also for one that does not exist."""
        selector = {key: value for key, value in place.items() if key != "jobName"} | {"pipelineName": place["jobName"]}
        found = self._ask(_PARTITIONS, {"job": selector}, "pipelineOrError", "Pipeline")
        keys, partition = found["partitionKeysOrError"]["partitionKeys"], self._partition()
        if partition is None and keys:
            raise NotThereError(
                f"the job {self.parameters.job!r} is run by partition, and none is given", remedy="set `partition`"
            )
        if partition is not None and partition not in keys:
            raise NotThereError(
                f"the job {self.parameters.job!r} has no partition {partition!r}",
                where=self._api.host,
                remedy="set `partition`; null for a job without partitions",
            )

    def _runs(self) -> list[Run]:
        """The runs of this incident and this job, newest first."""
        tags = [{"key": key, "value": value} for key, value in self._tags().items()]
        found = self._ask(_RUNS, {"filter": {"pipelineName": self.parameters.job, "tags": tags}}, "runsOrError", "Runs")
        return [Run(run["runId"], run["status"]) for run in found["results"]]

    def _run(self, run_id: str) -> Run:
        found = self._ask(_RUN, {"id": run_id}, "runOrError", "Run")
        return Run(found["runId"], found["status"])

    def _launch_or_find(self, change: Change, earlier: Sequence[Run]) -> Run:
        """A request that got no answer may have been heard: it is not sent again, its run is looked for."""
        known, clock = {run.id for run in earlier}, self.context.clock
        try:
            return self._launch(change)
        except UnreachableError:
            deadline = clock.monotonic() + _GRACE
            while clock.monotonic() < deadline:
                clock.sleep(_EVERY)
                with contextlib.suppress(UnreachableError):
                    if found := next((run for run in self._runs() if run.id not in known), None):
                        return found
            raise

    def _launch(self, change: Change) -> Run:
        params = {
            "selector": dict(change.detail),
            "runConfigData": self.parameters.config,
            "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in self._tags().items()]},
        }
        run = self._ask(_LAUNCH, {"params": params}, "launchRun", "LaunchRunSuccess")["run"]
        return Run(run["runId"], run["status"])

    def _tags(self) -> dict[str, str]:
        partition = self._partition()
        tags = {INCIDENT: self.context.incident_id, SUBJECT: self.target_id}
        return tags | ({PARTITION: partition} if partition is not None else {})

    def _partition(self) -> str | None:
        partition = self.parameters.partition
        return None if partition is None else partition.replace("{subject}", self.target_id)

    def _object(self) -> str:
        partition = self._partition()
        return f"job {self.parameters.job}" + (f", partition {partition}" if partition is not None else "")

    def _ask(self, query: str, variables: Mapping[str, Any], field: str, good: str) -> Any:
        from ops_platform.clients.dagster import ask

        return ask(self._api, query, variables, field, good)


class RunDagsterJob(Playbook[RunJobParameters]):
    name = "dagster.run_job"
    title = "Run a Dagster job"
    kinds = ANY_KIND
    what = (
        "Launches a job of the Dagster of the inventory (`platform.dagster`), with the incident's subject as its partition, and waits "
        "for its end. A run of the same incident that is on its way is waited for, and one that succeeded is not repeated."
    )
    why_safe = "The job is one of yours, runs at most once at a time for an incident, and its run shows everything in the web UI."
    blast_radius = "Whatever the job does."
    rights = ("to reach the GraphQL API of a dagster-webserver that is not read-only",)
    Parameters = RunJobParameters

    def action(self, context: Context[RunJobParameters]) -> Action:
        return RunJobAction(context)
