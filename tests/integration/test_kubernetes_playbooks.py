"""The playbooks of Kubernetes against a real control plane, each with exactly the rights that it says it needs."""

from __future__ import annotations

import base64
import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from ops_platform.actions import Action, ActionResult, ModeGuard, Outcome, Status, run_action
from ops_platform.clients.access import Access
from ops_platform.clients.kubernetes_objects import Right
from ops_platform.errors import AccessDeniedError, OpsError, RefusedError, UnreachableError
from ops_platform.inventory import LoadedInventory
from ops_platform.inventory.base import Mode
from ops_platform.inventory.model import Inventory
from ops_platform.inventory.systems import KubernetesSystem
from ops_platform.ledger import Ledger
from ops_platform.remediation.model import Peers
from ops_platform.remediation.playbook import Context, Done, playbook
from ops_platform.remediation.playbooks.kubernetes.shared import RESOURCES
from tests.integration import http_faults as faults
from tests.integration.http_faults import FaultyProxy
from tests.integration.incident_rig import solved
from tests.integration.kubernetes_faults import as_admin, config, refusal
from tests.kube_rig import APPS, BEHAVIOUR, CORE, Kube, pod
from tests.remediation_rig import fresh_database
from tests.rig import Cluster, Ground, eventually

pytestmark = pytest.mark.timeout(600)

BATCH, SCALING = "/apis/batch/v1", "/apis/autoscaling/v2"
IN_VAULT = "in Vault: "


class KilledError(BaseException):
    """The end of a run in the middle, which nothing catches."""


@dataclass
class MovedClock:
    """The real time and what was slept; sleeping takes none of it."""

    ahead: timedelta = timedelta(0)
    slept: Callable[[], None] = lambda: None

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def monotonic(self) -> float:
        return self.now().timestamp()

    def sleep(self, seconds: float) -> None:
        self.ahead += timedelta(seconds=seconds)
        self.slept()


@dataclass
class Desk:
    """One cluster in an inventory, a namespace of its own, and a ledger."""

    kube: Kube
    namespace: str
    ledger: Ledger
    clock: MovedClock = field(default_factory=MovedClock)
    namespaces: list[str] = field(default_factory=list[str])
    vaults: dict[str, Any] = field(default_factory=dict[str, Any])
    kubeconfig: Path | None = None
    incident: str = "i-one"
    opened: list[Access] = field(default_factory=list[Access])

    @property
    def api(self) -> Any:
        return self.kube.api

    def access(self) -> Access:
        system = {
            "id": "main", "kind": "kubernetes", "environment": "test", "owner": "team", "namespaces": self.namespaces,
            "kubeconfig": f"file://{self.kubeconfig or self.kube.kubeconfig}",
        }  # fmt: skip
        body = {
            "version": 1, "platform": {"name": "tests"}, "owners": {"team": {"name": "Team"}}, "environments": {"test": {}},
            "vaults": self.vaults, "systems": [system],
        }  # fmt: skip
        access = Access(LoadedInventory(Inventory.model_validate(body), Path("/platform.yaml")), clock=self.clock)
        self.opened.append(access)
        return access

    def context(self, book: str, /, **parameters: Any) -> Context[Any]:
        access = self.access()
        (system,) = access.inventory.systems
        assert isinstance(system, KubernetesSystem)
        given = playbook(f"kubernetes.{book}").read_parameters(parameters)
        return Context(access, system, given, self.incident, self.clock.now(), self.clock)

    def action(self, book: str, /, **parameters: Any) -> Action:
        return playbook(f"kubernetes.{book}").action(self.context(book, **parameters))

    def run(self, book: str, /, *, mode: Mode = Mode.ENFORCE, **parameters: Any) -> ActionResult:
        return self.carry_out(self.action(book, **parameters), mode=mode)

    def carry_out(self, action: Action, *, mode: Mode = Mode.ENFORCE) -> ActionResult:
        return run_action(action, ledger=self.ledger, guards=[ModeGuard(mode)], actor="test", clock=self.clock)

    def undo(self, book: str, result: ActionResult, /, **parameters: Any) -> ActionResult:
        done = [Done(change, applied) for change, applied in result.outcomes if applied.outcome is Outcome.APPLIED]
        action = playbook(f"kubernetes.{book}").undo(self.context(book, **parameters), done)
        assert action is not None
        return self.carry_out(action)

    def peers(self, book: str, /, **parameters: Any) -> Peers | None:
        return playbook(f"kubernetes.{book}").peers(self.context(book, **parameters))

    def in_space(self, **more: Any) -> dict[str, Any]:
        return {"namespace": self.namespace, **more}

    def limited(self, name: str, without: str | None = None) -> None:
        """From now on as a service account with exactly the playbook's rights, or with one verb less: `apps/deployments: patch`."""
        rights = [Right.parse(text) for text in playbook(f"kubernetes.{name}").rights if not text.startswith(IN_VAULT)]
        taken = Right.parse(without) if without else None
        rules: dict[bool, list[Mapping[str, Any]]] = {True: [], False: []}
        for right in rights:
            verbs = right.verbs
            if taken and (taken.group, taken.resource, taken.cluster) == (right.group, right.resource, right.cluster):
                assert set(taken.verbs) <= set(verbs), f"{name} does not say that it needs {taken}"
                verbs = tuple(verb for verb in verbs if verb not in taken.verbs)
            if verbs:
                rules[right.cluster].append(Right(right.group, right.resource, verbs, right.cluster).as_rule())
        account = f"ops-{secrets.token_hex(3)}"
        self.kubeconfig = self.kube.service_account(
            self.namespace, {self.namespace: rules[False]}, cluster=rules[True], name=account
        )

    # What is in the cluster

    def path(self, kind: str, name: str) -> str:
        return RESOURCES[kind].path(self.namespace, name)

    def get(self, kind: str, name: str) -> Any:
        return self.api.get(self.path(kind, name))

    def pods(self, app: str = "shop") -> list[Any]:
        return [each for each in self.kube.pods(self.namespace, app) if "deletionTimestamp" not in each["metadata"]]

    def ready(self, app: str = "shop") -> int:
        conditions = [each["status"].get("conditions", []) for each in self.pods(app)]
        return sum({"Ready": "True"}.items() <= {c["type"]: c["status"] for c in each}.items() for each in conditions)


@pytest.fixture(scope="session")
def two_nodes(kube: Kube) -> None:
    """Where the pods of all tests may run."""
    for _ in range(2):
        kube.node()


@pytest.fixture
def desk(kube: Kube, two_nodes: None, shared_cluster: Cluster) -> Iterator[Desk]:
    with contextlib.ExitStack() as stack:
        database = fresh_database(shared_cluster, stack)
        ledger = stack.enter_context(Ledger(lambda: shared_cluster.server.connect(database)))
        made = Desk(kube, kube.namespace(), ledger)
        yield made
        for access in made.opened:
            access.close()
        kube.api.delete(f"{CORE}/namespaces/{made.namespace}")


@contextlib.contextmanager
def playing(what: Callable[[], object]) -> Iterator[None]:
    """Plays a controller on the side, until it has done its part."""
    wrong: list[Exception] = []

    def play() -> None:
        try:
            eventually(what)
        except Exception as error:  # noqa: BLE001 - it is told below
            wrong.append(error)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    yield
    thread.join(90)
    assert not thread.is_alive()
    assert not wrong, wrong


def outcomes(result: ActionResult) -> list[str]:
    return [applied.outcome.value for _, applied in result.outcomes]


def why(result: ActionResult) -> str:
    return "; ".join(
        [applied.reason for _, applied in result.outcomes]
        + [
            f"{check.name}: {check.holds} {check.detail}"
            for check in (result.verification.checks if result.verification else ())
        ]
    )


def is_done(result: ActionResult) -> bool:
    assert result.status is Status.DONE, why(result)
    return True


def kill_before_verify(monkeypatch: pytest.MonkeyPatch, action: Action) -> None:
    """The run ends when everything is written and nothing is looked at: as kill -9 does."""

    def verify(*_: object) -> object:
        raise KilledError

    monkeypatch.setattr(action, "verify", verify)


# Restart


def test_a_restart_replaces_every_pod_and_stands_in_the_ledger(desk: Desk) -> None:
    path = desk.kube.deployment(desk.namespace, replicas=3)
    before = {each["metadata"]["uid"] for each in desk.pods()}
    desk.limited("rollout_restart")
    result = desk.run("rollout_restart", **desk.in_space(name="shop"))
    assert is_done(result)
    assert before.isdisjoint(each["metadata"]["uid"] for each in desk.pods())
    assert desk.ready() == 3
    assert [entry.kind for entry in desk.ledger.entries()] == ["action.plan", "action.outcome", "action.verification"]
    assert desk.peers("rollout_restart", **desk.in_space(name="shop")) == Peers(3, 3, "ready replicas")
    generation = desk.api.get(path)["metadata"]["generation"]
    assert desk.run("rollout_restart", **desk.in_space(name="shop")).status is Status.NOTHING
    assert desk.api.get(path)["metadata"]["generation"] == generation
    desk.incident = "i-two"
    assert is_done(desk.run("rollout_restart", **desk.in_space(name="shop")))


@pytest.mark.parametrize("kind", ["StatefulSet", "DaemonSet"])
def test_other_workloads_are_restarted_too(desk: Desk, kind: str) -> None:
    more = {"replicas": 2, "serviceName": "db"} if kind == "StatefulSet" else {}
    spec = {"selector": {"matchLabels": {"app": "db"}}, "template": pod("db"), **more}
    desk.api.post(f"{APPS}/namespaces/{desk.namespace}/{kind.lower()}s", {"metadata": {"name": "db"}, "spec": spec})
    counted = "readyReplicas" if kind == "StatefulSet" else "numberReady"
    eventually(lambda: desk.get(kind, "db")["status"].get(counted, 0) >= 2)
    before = {each["metadata"]["uid"] for each in desk.pods("db")}
    desk.limited("rollout_restart")
    assert is_done(desk.run("rollout_restart", **desk.in_space(name="db", kind=kind)))
    assert before.isdisjoint(each["metadata"]["uid"] for each in desk.pods("db"))


def test_a_restart_that_was_killed_is_not_made_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    path = desk.kube.deployment(desk.namespace)
    generation = desk.api.get(path)["metadata"]["generation"]
    first = desk.action("rollout_restart", **desk.in_space(name="shop"))
    admitted = first.plan()
    kill_before_verify(monkeypatch, first)
    with pytest.raises(KilledError):
        desk.carry_out(first)
    again = desk.action("rollout_restart", **desk.in_space(name="shop"))
    left = again.plan()
    assert left.changes in ((), admitted.changes)  # what is left is part of what was admitted
    result = desk.carry_out(desk.action("rollout_restart", **desk.in_space(name="shop")))
    assert result.status in (Status.DONE, Status.NOTHING)
    assert set(outcomes(result)) <= {"already_done"}
    assert desk.api.get(path)["metadata"]["generation"] == generation + 1


def test_a_restart_that_does_not_become_ready_is_no_success(desk: Desk) -> None:
    path = desk.kube.deployment(desk.namespace, progressDeadlineSeconds=1)
    behaves = {"metadata": {"annotations": {BEHAVIOUR: "unready"}}}
    action = desk.action("rollout_restart", **desk.in_space(name="shop"))
    plan = action.plan()
    change = plan.changes[0]
    assert action.check(change) is None
    desk.api.patch(path, {"spec": {"template": behaves}})
    applied = {change.object: action.apply(change)}
    assert applied[change.object].outcome is Outcome.CONTENDED  # somebody rolls it out: theirs goes first
    desk.api.patch(
        path, {"spec": {"template": {"metadata": {"annotations": {"ops-platform/restarted-for": desk.incident}}}}}
    )
    applied[change.object] = action.apply(change)
    assert applied[change.object].outcome is Outcome.ALREADY_DONE
    assert action.verify(plan, applied).holds is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"paused": True}, "paused"),
        ({"replicas": 0}, "wants no pods"),
        ({"strategy": {"type": "Recreate", "rollingUpdate": None}}, "all pods down at once"),
        ({"template": {"metadata": {"annotations": {BEHAVIOUR: "unready"}}}}, "under way"),
    ],
)
def test_a_workload_that_would_not_survive_a_restart_is_left_alone(
    desk: Desk, change: Mapping[str, Any], said: str
) -> None:
    path = desk.kube.deployment(desk.namespace)
    desk.api.patch(path, {"spec": change})
    eventually(
        lambda: desk.api.get(path)["status"].get("observedGeneration") == desk.api.get(path)["metadata"]["generation"]
    )
    if "replicas" not in change:
        with pytest.raises(RefusedError, match=said):
            desk.run("rollout_restart", **desk.in_space(name="shop"))
    else:
        eventually(lambda: not desk.pods())
        with pytest.raises(RefusedError, match=said):
            desk.run("rollout_restart", **desk.in_space(name="shop"))


def test_an_object_that_changed_between_plan_and_apply_is_left_alone(desk: Desk) -> None:
    path = desk.kube.deployment(desk.namespace)
    action = desk.action("rollout_restart", **desk.in_space(name="shop"))
    change = action.plan().changes[0]
    desk.api.patch(path, {"spec": {"paused": True}})
    assert (found := action.check(change)) is not None
    assert found.outcome is Outcome.CONTENDED
    assert action.apply(change).outcome is Outcome.CONTENDED
    desk.api.delete(path)
    eventually(lambda: not desk.api.exists(path))
    assert (found := action.check(change)) is not None
    assert found.outcome is Outcome.MISSING
    desk.kube.deployment(desk.namespace)
    assert (found := action.check(change)) is not None
    assert found.outcome is Outcome.CONTENDED
    assert "another object of the same name" in found.reason


def test_observing_changes_nothing(desk: Desk) -> None:
    path = desk.kube.deployment(desk.namespace)
    before = desk.api.get(path)["metadata"]["generation"]
    assert desk.run("rollout_restart", mode=Mode.OBSERVE, **desk.in_space(name="shop")).status is Status.OBSERVED
    assert desk.api.get(path)["metadata"]["generation"] == before


# Bad days


@pytest.mark.parametrize(
    "fault",
    [
        faults.lose_the_answer,
        faults.reset_in_the_request,
        refusal(409, "the object has been modified"),
        refusal(429, retry_after="2"),
        refusal(500),
    ],
    ids=["lost", "reset", "409", "429", "500"],
)
def test_a_restart_survives_a_bad_day_of_the_api_server(desk: Desk, tmp_path: Path, fault: faults.Fault) -> None:
    """The write meets the fault, and so does the first watch; the restart is made once all the same."""
    path = desk.kube.deployment(desk.namespace)
    generation = desk.api.get(path)["metadata"]["generation"]
    met: list[str] = []

    def choose(handler: Any) -> None:
        kind = "watch" if "watch=true" in handler.path else handler.command
        meets = kind in ("PATCH", "watch") and kind not in met
        met.append(kind)
        (fault if meets and kind == "PATCH" else faults.streaming(0) if meets else faults.streaming())(handler)

    with FaultyProxy(desk.kube.port, upstream=as_admin(desk.kube), always=choose) as proxy:
        desk.kubeconfig = tmp_path / "kubeconfig"
        desk.kubeconfig.touch(0o600)
        desk.kubeconfig.write_text(yaml.safe_dump(config(proxy.url)))
        assert is_done(desk.run("rollout_restart", **desk.in_space(name="shop")))
    assert "PATCH" in met
    assert desk.api.get(path)["metadata"]["generation"] == generation + 1


def test_a_server_that_is_away_is_not_an_empty_one(desk: Desk, tmp_path: Path) -> None:
    desk.kubeconfig = tmp_path / "kubeconfig"
    desk.kubeconfig.touch(0o600)
    desk.kubeconfig.write_text(yaml.safe_dump(config("http://127.0.0.1:1")))
    action = desk.action("clean_finished_jobs", **desk.in_space())  # making it asks nobody for anything
    for ask in (action.plan, lambda: desk.peers("rollout_restart", **desk.in_space(name="shop"))):
        with pytest.raises(UnreachableError):
            ask()


# The fence


def test_nothing_is_done_outside_of_the_fence(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace)
    desk.namespaces = ["shop-*"]
    with pytest.raises(RefusedError, match="not among the system's namespaces"):
        desk.run("rollout_restart", **desk.in_space(name="shop"))
    desk.namespaces = []
    with pytest.raises(RefusedError, match="the cluster itself lives there"):
        desk.run("rollout_restart", namespace="kube-system", name="coredns")
    desk.namespaces = [desk.namespace]
    assert is_done(desk.run("rollout_restart", **desk.in_space(name="shop")))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("rollback", {"name": "x"}), ("scale", {"name": "x", "replicas": 2, "at_most": 3}), ("argo_abort", {"name": "x"}),
        ("argo_retry", {"name": "x"}), ("delete_stuck_pod", {"name": "x"}), ("clean_finished_jobs", {}),
        ("grow_volume_claim", {"name": "x", "percent": 10, "at_most": 1}), ("renew_certificate_secret", {"name": "x"}),
    ],
)  # fmt: skip
def test_each_playbook_has_the_fence(desk: Desk, name: str, more: Mapping[str, Any]) -> None:
    with pytest.raises(RefusedError, match="the cluster itself lives there"):
        desk.action(name, namespace="kube-system", **more).plan()


# Roll back


def roll_out(desk: Desk, image: str, behaviour: str | None = None) -> None:
    template = {
        "metadata": {"annotations": {BEHAVIOUR: behaviour}},
        "spec": {"containers": [{"name": "main", "image": image}]},
    }
    desk.api.patch(desk.path("Deployment", "shop"), {"spec": {"template": template}})


def in_vain(desk: Desk) -> None:
    """The newest revision has a pod, which is not ready."""
    eventually(lambda: desk.get("Deployment", "shop")["status"].get("unavailableReplicas"))
    path = desk.path("Deployment", "shop")
    eventually(
        lambda: desk.api.get(path)["status"].get("observedGeneration") == desk.api.get(path)["metadata"]["generation"]
    )


def image(desk: Desk) -> str:
    return desk.get("Deployment", "shop")["spec"]["template"]["spec"]["containers"][0]["image"]


def test_a_deployment_goes_back_to_the_revision_that_is_ready_and_forward_again(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace, replicas=3)
    roll_out(desk, "shop:2", "unready")
    in_vain(desk)
    desk.limited("rollback")
    result = desk.run("rollback", **desk.in_space(name="shop"))
    assert is_done(result)
    assert image(desk) == "shop:1"
    assert desk.ready() == 3
    assert "pods are ready now" in result.plan.facts["evidence"]
    change = result.plan.changes[0]
    assert (change.before["images"], change.after["images"]) == (["shop:2"], ["shop:1"])
    assert desk.run("rollback", **desk.in_space(name="shop")).status is Status.NOTHING
    undone = desk.undo("rollback", result, **desk.in_space(name="shop"))
    assert is_done(undone)
    assert image(desk) == "shop:2"


def test_what_never_was_healthy_is_passed_over(desk: Desk) -> None:
    """Two bad releases, one upon the other: the way back leads past both."""
    desk.kube.deployment(desk.namespace, replicas=3)
    for tag in ("shop:2", "shop:3"):
        roll_out(desk, tag, "unready")
        in_vain(desk)
    result = desk.run("rollback", **desk.in_space(name="shop"))
    assert is_done(result)
    assert image(desk) == "shop:1"


def test_a_rollback_that_was_killed_goes_no_further_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.kube.deployment(desk.namespace)
    roll_out(desk, "shop:2")
    desk.kube.wait_rolled_out(desk.path("Deployment", "shop"))
    roll_out(desk, "shop:3", "unready")
    in_vain(desk)
    first = desk.action("rollback", **desk.in_space(name="shop"))
    admitted = first.plan()
    kill_before_verify(monkeypatch, first)
    with pytest.raises(KilledError):
        desk.carry_out(first)
    assert desk.action("rollback", **desk.in_space(name="shop")).plan().changes in ((), admitted.changes)
    result = desk.run("rollback", **desk.in_space(name="shop"))
    assert result.status in (Status.DONE, Status.NOTHING)
    assert image(desk) == "shop:2"


def test_without_evidence_nothing_is_rolled_back(desk: Desk) -> None:
    """Both revisions are without a ready pod, and the older one did not stand for long."""
    desk.kube.deployment(desk.namespace, behaviour="unready", wait=False)
    in_vain(desk)
    begun = datetime.fromisoformat(desk.get("Deployment", "shop")["metadata"]["creationTimestamp"])
    eventually(lambda: datetime.now(UTC) - begun > timedelta(seconds=3))
    roll_out(desk, "shop:2", "unready")
    in_vain(desk)
    with pytest.raises(RefusedError, match="none is known to have been healthy"):
        desk.run("rollback", **desk.in_space(name="shop"))
    with pytest.raises(RefusedError, match="none is known to have been healthy"):
        desk.run("rollback", **desk.in_space(name="shop", stood_for="1s", only_ready=True))
    plan = desk.action("rollback", **desk.in_space(name="shop", stood_for="1s")).plan()
    assert "it was the current one for 0:0" in plan.facts["evidence"]  # minutes at most
    assert plan.changes[0].after["images"] == ["shop:1"]


def test_a_revision_that_is_ready_is_not_rolled_back_unless_asked(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace)
    roll_out(desk, "shop:2")
    desk.kube.wait_rolled_out(desk.path("Deployment", "shop"))
    with pytest.raises(RefusedError, match="every pod of revision 2 is ready"):
        desk.run("rollback", **desk.in_space(name="shop"))
    with pytest.raises(RefusedError, match="none is known"):
        desk.run("rollback", **desk.in_space(name="shop", even_when_ready=True))


def test_a_release_that_comes_between_plan_and_apply_is_not_taken_away(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace)
    roll_out(desk, "shop:2", "unready")
    in_vain(desk)
    action = desk.action("rollback", **desk.in_space(name="shop"))
    change = action.plan().changes[0]
    roll_out(desk, "shop:3")
    assert action.apply(change).outcome is Outcome.CONTENDED
    assert image(desk) == "shop:3"


def test_a_template_is_told_by_its_digest_alone(desk: Desk) -> None:
    secret = "hunter2-in-plain-sight"
    desk.kube.deployment(
        desk.namespace,
        template={"containers": [{"name": "main", "image": "shop:1", "env": [{"name": "P", "value": secret}]}]},
    )
    roll_out(desk, "shop:2", "unready")
    in_vain(desk)
    assert is_done(desk.run("rollback", **desk.in_space(name="shop")))
    assert secret not in str([entry.body for entry in desk.ledger.entries()])


# Scale


def scaling(desk: Desk, **more: Any) -> dict[str, Any]:
    return desk.in_space(**{"name": "shop", "at_most": 5, **more})


def test_a_workload_is_scaled_and_back(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace, replicas=2)
    desk.limited("scale")
    result = desk.run("scale", **scaling(desk, by=2))
    assert is_done(result)
    assert desk.ready() == 4
    assert desk.run("scale", **scaling(desk, by=2)).status is Status.NOTHING  # once for each incident
    undone = desk.undo("scale", result, **scaling(desk, by=2))
    assert is_done(undone)
    eventually(lambda: desk.ready() == 2)
    assert undone.plan.changes[0].after == {"replicas": 2}


def test_a_scaling_that_was_killed_is_not_added_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.kube.deployment(desk.namespace, replicas=1)
    first = desk.action("scale", **scaling(desk, by=2))
    admitted = first.plan()
    kill_before_verify(monkeypatch, first)
    with pytest.raises(KilledError):
        desk.carry_out(first)
    assert desk.action("scale", **scaling(desk, by=2)).plan().changes in ((), admitted.changes)
    assert desk.run("scale", **scaling(desk, by=2)).status in (Status.DONE, Status.NOTHING)
    assert desk.get("Deployment", "shop")["spec"]["replicas"] == 3


@pytest.mark.parametrize("more", [{"replicas": 6}, {"by": 4}, {"by": -2}, {"replicas": 0}])
def test_bounds_hold(desk: Desk, more: Mapping[str, Any]) -> None:
    desk.kube.deployment(desk.namespace, replicas=2)
    with pytest.raises(RefusedError, match="1 to 5 are allowed"):
        desk.run("scale", **scaling(desk, **more))


def test_whoever_scaled_meanwhile_is_not_overruled(desk: Desk) -> None:
    path = desk.kube.deployment(desk.namespace, replicas=1)
    action = desk.action("scale", **scaling(desk, replicas=2))
    change = action.plan().changes[0]
    desk.api.patch(path, {"spec": {"replicas": 3}})
    assert action.apply(change).outcome is Outcome.CONTENDED
    assert desk.api.get(path)["spec"]["replicas"] == 3


QUOTA = {"requests.cpu": "1", "pods": "10"}


@pytest.mark.parametrize(("hard", "said"), [({"pods": "3"}, "pods"), ({"requests.cpu": "700m"}, "requests.cpu")])
def test_a_quota_without_room_is_hit_before_anything_is_changed(desk: Desk, hard: Mapping[str, str], said: str) -> None:
    resources = {"requests": {"cpu": "250m"}}
    path = desk.kube.deployment(
        desk.namespace,
        replicas=2,
        template={"containers": [{"name": "main", "image": "shop:1", "resources": resources}]},
    )
    quotas = f"{CORE}/namespaces/{desk.namespace}/resourcequotas"
    desk.api.post(quotas, {"metadata": {"name": "small"}, "spec": {"hard": hard}})
    eventually(lambda: desk.api.get(f"{quotas}/small").get("status", {}).get("used"))
    with pytest.raises(RefusedError, match=f"the quota small allows .* {said}"):
        desk.run("scale", **scaling(desk, replicas=4))
    assert desk.api.get(path)["spec"]["replicas"] == 2


def test_a_quota_that_is_used_up_meanwhile_fails_the_verification(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace, replicas=1)
    action = desk.action("scale", **scaling(desk, replicas=2, within="3s"))
    plan = action.plan()
    quotas = f"{CORE}/namespaces/{desk.namespace}/resourcequotas"
    desk.api.post(quotas, {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "1"}}})
    eventually(lambda: desk.api.get(f"{quotas}/none").get("status", {}).get("used"))
    applied = {plan.changes[0].object: action.apply(plan.changes[0])}
    found = action.verify(plan, applied)
    assert found.holds is False
    assert "pods cannot be made" in found.checks[0].detail or "1 pods are ready" in found.checks[0].detail


def autoscale(desk: Desk) -> str:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "shop"}
    spec = {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 3}
    scalers = f"{SCALING}/namespaces/{desk.namespace}/horizontalpodautoscalers"
    desk.api.post(scalers, {"metadata": {"name": "auto"}, "spec": spec})
    return f"{scalers}/auto"


def test_what_an_autoscaler_owns_is_not_scaled_beside_it(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace, replicas=1)
    autoscale(desk)
    with pytest.raises(RefusedError, match=r"the autoscaler auto owns its number of replicas \(1 to 3\)"):
        desk.run("scale", **scaling(desk, replicas=2))
    with pytest.raises(RefusedError, match="4 replicas are asked for, and 1 to 3"):
        desk.run("scale", **scaling(desk, replicas=4, through_autoscaler=True))


def test_an_autoscaler_can_be_told_to_want_more(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace, replicas=1)
    path = autoscale(desk)
    desk.limited("scale")
    result = desk.run("scale", **scaling(desk, replicas=2, through_autoscaler=True))
    assert is_done(result)
    assert desk.api.get(path)["spec"]["minReplicas"] == 2
    assert is_done(desk.undo("scale", result, **scaling(desk, replicas=2, through_autoscaler=True)))
    assert desk.api.get(path)["spec"]["minReplicas"] == 1


# Argo Rollouts

ARGO = "/apis/argoproj.io/v1alpha1"
HASH = "rollouts-pod-template-hash"


def rollout(desk: Desk, *, stable_pods: int = 2, **status: Any) -> str:
    """A delivery under way, with the pods of the stable revision."""
    desk.kube.argo_rollouts()
    rollouts = f"{ARGO}/namespaces/{desk.namespace}/rollouts"
    strategy = {"canary": {"steps": [{"setWeight": 20}, {"pause": {}}]}}
    spec = {"replicas": 2, "selector": {"matchLabels": {"app": "shop"}}, "strategy": strategy, "template": pod("shop")}
    desk.api.post(
        rollouts, {"apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout", "metadata": {"name": "shop"}, "spec": spec}
    )
    state = {"phase": "Paused", "currentPodHash": "new", "stableRS": "old", "currentStepIndex": 1, **status}
    desk.api.patch(f"{rollouts}/shop/status", {"status": state})
    for number in range(stable_pods):
        made = pod("shop")
        made["metadata"] |= {"name": f"old-{number}", "labels": {"app": "shop", HASH: "old"}}
        desk.api.post(f"{CORE}/namespaces/{desk.namespace}/pods", made)
    eventually(lambda: desk.ready() == stable_pods)
    return f"{rollouts}/shop"


def controller_sees(desk: Desk, path: str, *, abort: bool, phase: str) -> Callable[[], bool]:
    def play() -> bool:
        if bool(desk.api.get(path)["status"].get("abort")) is not abort:
            return False
        heard = "2026-03-01T03:00:00Z" if abort else None
        desk.api.patch(f"{path}/status", {"status": {"phase": phase, "abortedAt": heard}})
        return True

    return play


def test_a_delivery_is_aborted_and_retried(desk: Desk) -> None:
    path = rollout(desk)
    desk.limited("argo_abort")
    with playing(controller_sees(desk, path, abort=True, phase="Degraded")):
        result = desk.run("argo_abort", **desk.in_space(name="shop"))
    assert is_done(result)
    assert desk.run("argo_abort", **desk.in_space(name="shop")).status is Status.NOTHING
    assert desk.peers("argo_abort", **desk.in_space(name="shop")) == Peers(2, 2, "ready pods of the stable revision")
    with playing(controller_sees(desk, path, abort=False, phase="Progressing")):
        assert is_done(desk.undo("argo_abort", result, **desk.in_space(name="shop")))
    aborted = {"abort": True, "abortedAt": "2026-03-01T03:00:00Z", "phase": "Degraded"}
    desk.api.patch(f"{path}/status", {"status": aborted})
    desk.limited("argo_retry")
    with playing(controller_sees(desk, path, abort=False, phase="Progressing")):
        retried = desk.run("argo_retry", **desk.in_space(name="shop"))
    assert is_done(retried)
    with playing(controller_sees(desk, path, abort=True, phase="Degraded")):
        assert is_done(desk.undo("argo_retry", retried, **desk.in_space(name="shop")))


@pytest.mark.parametrize("phase", ["Paused", "Degraded"])
def test_an_abort_that_nobody_hears_is_no_success(desk: Desk, phase: str) -> None:
    """Degraded is also what has waited for too long, and is not aborted."""
    rollout(desk, phase=phase)
    result = desk.run("argo_abort", **desk.in_space(name="shop", within="1s"))
    assert result.status is Status.FAILED
    assert f"the phase is {phase}" in why(result)


@pytest.mark.parametrize(
    ("name", "status", "pods", "said"),
    [
        ("argo_abort", {"currentPodHash": "old"}, 1, "no delivery is under way"),
        ("argo_abort", {"stableRS": ""}, 0, "no stable revision"),
        ("argo_abort", {}, 0, "no pod of the stable revision is ready"),
        ("argo_retry", {"abort": True, "currentPodHash": "old"}, 0, "no delivery is under way"),
    ],
)
def test_a_rollout_that_cannot_go_that_way_is_left_alone(
    desk: Desk, name: str, status: Mapping[str, Any], pods: int, said: str
) -> None:
    rollout(desk, stable_pods=pods, **status)
    with pytest.raises(RefusedError, match=said):
        desk.run(name, **desk.in_space(name="shop"))


def test_a_rollout_that_is_paused_by_hand_is_not_retried(desk: Desk) -> None:
    path = rollout(desk, stable_pods=0, abort=True)
    desk.api.patch(path, {"spec": {"paused": True}})
    with pytest.raises(RefusedError, match=r"spec\.paused"):
        desk.run("argo_retry", **desk.in_space(name="shop"))


def test_another_delivery_than_the_planned_one_is_not_aborted(desk: Desk) -> None:
    path = rollout(desk)
    action = desk.action("argo_abort", **desk.in_space(name="shop"))
    change = action.plan().changes[0]
    desk.api.patch(f"{path}/status", {"status": {"currentPodHash": "newer"}})
    assert action.apply(change).outcome is Outcome.CONTENDED
    assert not desk.api.get(path)["status"].get("abort")


# Stuck pods


def behaving(desk: Desk, behaviour: str, **more: Any) -> Any:
    desk.kube.deployment(desk.namespace, replicas=1, behaviour=behaviour, wait=False, **more)
    return eventually(
        lambda: next((each for each in desk.pods() if "containerStatuses" in each.get("status", {})), None)
    )


def test_a_pod_in_a_crash_loop_is_replaced(desk: Desk) -> None:
    name = behaving(desk, "crashing")["metadata"]["name"]
    desk.limited("delete_stuck_pod")
    result = desk.run("delete_stuck_pod", **desk.in_space(name=name))
    assert is_done(result)
    assert result.plan.changes[0].before["stuck"] == "crash loop"
    assert not desk.api.exists(desk.path("Pod", name))
    assert desk.run("delete_stuck_pod", **desk.in_space(name=name)).status is Status.NOTHING


def test_an_alert_about_a_pod_in_a_crash_loop_leads_to_a_closed_incident(desk: Desk, shared_cluster: Cluster) -> None:
    name = behaving(desk, "crashing")["metadata"]["name"]
    desk.limited("delete_stuck_pod")
    stands = lambda: desk.api.exists(desk.path("Pod", name))  # noqa: E731
    solved(shared_cluster, desk.access(), "kubernetes.delete_stuck_pod", desk.in_space(name=name), stands)


def test_a_pod_without_an_image_is_stuck_after_a_while(desk: Desk) -> None:
    found = behaving(desk, "unready")
    name = found["metadata"]["name"]
    state = {
        "name": "main",
        "image": "x",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": {"waiting": {"reason": "ImagePullBackOff"}},
    }
    desk.api.patch(f"{desk.path('Pod', name)}/status", {"status": {"containerStatuses": [state]}})
    with pytest.raises(RefusedError, match="but not for"):
        desk.run("delete_stuck_pod", **desk.in_space(name=name))
    desk.clock.ahead = timedelta(minutes=11)
    assert is_done(desk.run("delete_stuck_pod", **desk.in_space(name=name)))


def test_a_pod_that_is_not_stuck_is_left_alone(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace, replicas=1)
    name = desk.pods()[0]["metadata"]["name"]
    with pytest.raises(RefusedError, match="is not stuck: it is Running and ready"):
        desk.run("delete_stuck_pod", **desk.in_space(name=name))


def test_a_pod_that_recovers_between_plan_and_apply_is_left_alone(desk: Desk) -> None:
    found = behaving(desk, "crashing")
    name = found["metadata"]["name"]
    action = desk.action("delete_stuck_pod", **desk.in_space(name=name))
    change = action.plan().changes[0]
    running = {**found["status"]["containerStatuses"][0], "ready": True, "state": {"running": {}}}
    desk.api.patch(f"{desk.path('Pod', name)}/status", {"status": {"containerStatuses": [running]}})
    assert (kept := action.check(change)) is not None
    assert kept.outcome is Outcome.CONTENDED
    assert action.apply(change).outcome is Outcome.CONTENDED
    assert desk.api.exists(desk.path("Pod", name))


def test_a_pod_that_nobody_brings_back_is_left_alone_unless_asked(desk: Desk) -> None:
    made = pod("bare", behaviour="crashing")
    made["metadata"]["name"] = "bare"
    desk.api.post(f"{CORE}/namespaces/{desk.namespace}/pods", made)
    eventually(lambda: desk.get("Pod", "bare")["status"].get("containerStatuses"))
    with pytest.raises(RefusedError, match="no controller would bring the pod back"):
        desk.run("delete_stuck_pod", **desk.in_space(name="bare"))
    assert is_done(desk.run("delete_stuck_pod", **desk.in_space(name="bare", bare=True)))


def silent_node(desk: Desk) -> str:
    """A node that takes the pods of this test; `fall_silent` breaks it."""
    return desk.kube.node(labels={"test": desk.namespace})


def fall_silent(desk: Desk, node: str) -> None:
    path = f"{CORE}/nodes/{node}"
    desk.kube.silence_node(node)

    def says_nothing() -> bool:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        unknown = {
            "type": "Ready",
            "status": "Unknown",
            "reason": "Test",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        desk.api.patch(f"{path}/status", {"status": {"conditions": [unknown]}})
        return desk.api.get(path)["status"]["conditions"][0]["status"] == "Unknown"

    eventually(says_nothing)


def ends_never(desk: Desk, node: str | None = None) -> str:
    where = {"nodeSelector": {"test": desk.namespace}} if node else None
    desk.kube.deployment(desk.namespace, replicas=1, behaviour="stuck", template=where)
    name = desk.pods()[0]["metadata"]["name"]
    desk.api.delete(desk.path("Pod", name))
    eventually(lambda: desk.get("Pod", name)["metadata"].get("deletionTimestamp"))
    return name


def test_a_pod_that_does_not_end_goes_by_force_when_its_node_is_away(desk: Desk) -> None:
    node = silent_node(desk)
    name = ends_never(desk, node)
    with pytest.raises(RefusedError, match="but not for"):
        desk.run("delete_stuck_pod", **desk.in_space(name=name, force=True))
    desk.clock.ahead = timedelta(minutes=11)
    with pytest.raises(RefusedError, match="its node does not confirm"):
        desk.run("delete_stuck_pod", **desk.in_space(name=name))
    with pytest.raises(RefusedError, match="is ready: the pod may still run there"):
        desk.run("delete_stuck_pod", **desk.in_space(name=name, force=True))
    fall_silent(desk, node)
    desk.limited("delete_stuck_pod")
    result = desk.run("delete_stuck_pod", **desk.in_space(name=name, force=True))
    assert is_done(result)
    assert not desk.api.exists(desk.path("Pod", name))
    assert result.plan.changes[0].detail["grace"] == 0


def test_a_pod_of_a_stateful_set_goes_by_force_only_when_its_node_is_off_for_certain(desk: Desk) -> None:
    node = silent_node(desk)
    template = pod("db", behaviour="stuck", spec={"nodeSelector": {"test": desk.namespace}})
    spec = {"replicas": 1, "serviceName": "db", "selector": {"matchLabels": {"app": "db"}}, "template": template}
    desk.api.post(f"{APPS}/namespaces/{desk.namespace}/statefulsets", {"metadata": {"name": "db"}, "spec": spec})
    eventually(lambda: desk.ready("db") == 1)
    desk.api.delete(desk.path("Pod", "db-0"))
    fall_silent(desk, node)
    desk.clock.ahead = timedelta(minutes=11)
    with pytest.raises(RefusedError, match="it is one of a StatefulSet, and may still run"):
        desk.run("delete_stuck_pod", **desk.in_space(name="db-0", force=True))
    taint = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoSchedule"}
    desk.api.patch(f"{CORE}/nodes/{node}", {"spec": {"taints": [taint]}})
    result = desk.run("delete_stuck_pod", **desk.in_space(name="db-0", force=True))
    # The garbage collector of the cluster takes such a pod away, too: whoever comes first.
    assert outcomes(result) in (["applied"], ["already_done"], []), why(result)


def test_a_pod_that_waits_for_a_finalizer_is_left_alone(desk: Desk) -> None:
    made = pod("kept")
    made["metadata"] |= {"name": "kept", "finalizers": ["example.com/keep"]}
    desk.api.post(f"{CORE}/namespaces/{desk.namespace}/pods", made)
    desk.api.delete(desk.path("Pod", "kept"))
    desk.clock.ahead = timedelta(minutes=11)
    with pytest.raises(RefusedError, match="finalizer"):
        desk.run("delete_stuck_pod", **desk.in_space(name="kept", force=True, bare=True))
    desk.api.patch(desk.path("Pod", "kept"), {"metadata": {"finalizers": None}})


def test_the_peers_of_a_pod_are_its_siblings(desk: Desk) -> None:
    desk.kube.deployment(desk.namespace, replicas=3)
    name = desk.pods()[0]["metadata"]["name"]
    assert desk.peers("delete_stuck_pod", **desk.in_space(name=name)) == Peers(
        2, 2, "ready pods of the same controller"
    )


# Drain


def on_nodes(desk: Desk, count: int = 2) -> list[str]:
    """Nodes that only pods of this test are put on."""
    return [desk.kube.node(labels={"test": desk.namespace}) for _ in range(count)]


def pinned(desk: Desk) -> dict[str, Any]:
    return {"nodeSelector": {"test": desk.namespace}}


def place_of(desk: Desk) -> str:
    return desk.pods()[0]["spec"]["nodeName"]


def is_cordoned(desk: Desk, node: str) -> bool:
    return bool(desk.api.get(f"{CORE}/nodes/{node}")["spec"].get("unschedulable"))


def test_a_node_is_drained_and_its_pods_run_elsewhere(desk: Desk) -> None:
    on_nodes(desk)
    desk.kube.deployment(desk.namespace, replicas=2, template=pinned(desk))
    spec = {"selector": {"matchLabels": {"app": "agent"}}, "template": pod("agent", spec=pinned(desk))}
    desk.api.post(f"{APPS}/namespaces/{desk.namespace}/daemonsets", {"metadata": {"name": "agent"}, "spec": spec})
    eventually(lambda: desk.ready("agent") == 2)
    node = place_of(desk)
    desk.limited("cordon_drain")
    peers = desk.peers("cordon_drain", node=node)
    assert peers is not None
    assert peers.healthy >= 1
    result = desk.run("cordon_drain", node=node)
    assert is_done(result)
    assert is_cordoned(desk, node)
    eventually(lambda: desk.ready() == 2)
    assert {each["spec"]["nodeName"] for each in desk.pods()} == {each["spec"]["nodeName"] for each in desk.pods()} - {
        node
    }
    assert {each["spec"]["nodeName"] for each in desk.pods("agent")} >= {node}
    assert result.plan.population["node"] >= 2
    assert desk.run("cordon_drain", node=node).status is Status.NOTHING
    assert is_done(desk.undo("cordon_drain", result, node=node))
    assert not is_cordoned(desk, node)


def test_a_disruption_budget_keeps_a_pod_and_is_named(desk: Desk) -> None:
    on_nodes(desk)
    desk.kube.deployment(desk.namespace, replicas=1, template=pinned(desk))
    desk.kube.disruption_budget(desk.namespace, minAvailable=1)
    node, before = place_of(desk), desk.pods()[0]["metadata"]["uid"]
    result = desk.run("cordon_drain", node=node)
    assert result.status is Status.INCOMPLETE
    assert outcomes(result) == ["applied", "contended"]
    kept = result.outcomes[1][1]
    assert kept.detail == {"budget": "shop"}
    assert "the disruption budget shop keeps it" in kept.reason
    assert [each["metadata"]["uid"] for each in desk.pods()] == [before]
    assert desk.clock.ahead >= timedelta(minutes=1)  # it was patient
    # Once the budget allows it, what is left of the drain is done.
    desk.api.patch(
        f"/apis/policy/v1/namespaces/{desk.namespace}/poddisruptionbudgets/shop", {"spec": {"minAvailable": 0}}
    )
    eventually(lambda: outcomes(desk.run("cordon_drain", node=node)) in (["already_done", "applied"], []))
    eventually(lambda: before not in [each["metadata"]["uid"] for each in desk.pods()])


def test_a_budget_that_opens_while_it_is_waited_for_lets_the_pods_go_one_by_one(desk: Desk) -> None:
    on_nodes(desk)
    desk.kube.deployment(desk.namespace, replicas=3, template=pinned(desk))
    desk.kube.disruption_budget(desk.namespace, minAvailable=2)
    fewest: list[int] = []
    desk.clock.slept = lambda: fewest.append(desk.ready())
    result = desk.run("cordon_drain", node=place_of(desk), patience="10h")
    assert is_done(result)
    assert min(fewest, default=2) >= 2


def test_a_node_that_was_cordoned_before_stays_so(desk: Desk) -> None:
    on_nodes(desk)
    desk.kube.deployment(desk.namespace, replicas=1, template=pinned(desk))
    node = place_of(desk)
    desk.api.patch(f"{CORE}/nodes/{node}", {"spec": {"unschedulable": True}})
    result = desk.run("cordon_drain", node=node)
    assert is_done(result)
    assert [change.kind for change in result.plan.changes] == ["pod"]
    done = [Done(change, applied) for change, applied in result.outcomes]
    assert playbook("kubernetes.cordon_drain").undo(desk.context("cordon_drain", node=node), done) is None


def test_an_undo_does_not_lift_a_cordon_of_somebody_else(desk: Desk) -> None:
    (node,) = on_nodes(desk, 1)
    result = desk.run("cordon_drain", node=node)
    assert is_done(result)
    cordoned = {"metadata": {"annotations": {"ops-platform/cordoned-for": None}}}
    desk.api.patch(f"{CORE}/nodes/{node}", cordoned)
    undone = desk.undo("cordon_drain", result, node=node)
    assert outcomes(undone) == ["contended"]
    assert is_cordoned(desk, node)


def test_a_drain_that_was_killed_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    on_nodes(desk)
    desk.kube.deployment(desk.namespace, replicas=1, template=pinned(desk))
    node = place_of(desk)
    first = desk.action("cordon_drain", node=node)
    admitted = first.plan()
    evict = first.apply

    def apply(change: Any) -> Any:
        if change.kind == "pod":
            raise KilledError
        return evict(change)

    monkeypatch.setattr(first, "apply", apply)
    with pytest.raises(KilledError):
        desk.carry_out(first)
    assert is_cordoned(desk, node)
    left = desk.action("cordon_drain", node=node).plan()
    assert set(map(str, left.changes)) <= set(map(str, admitted.changes))
    result = desk.run("cordon_drain", node=node)
    assert outcomes(result) == ["already_done", "applied"]
    assert is_done(result)


def test_a_drain_stops_when_somebody_lifts_the_cordon(desk: Desk) -> None:
    on_nodes(desk)
    desk.kube.deployment(desk.namespace, replicas=1, template=pinned(desk))
    node = place_of(desk)
    action = desk.action("cordon_drain", node=node)
    change = action.plan().changes[1]
    assert (found := action.check(change)) is not None  # the node was never cordoned
    assert found.outcome is Outcome.CONTENDED
    desk.api.patch(f"{CORE}/nodes/{node}", {"spec": {"unschedulable": True}})
    assert action.check(change) is None


@pytest.mark.parametrize(
    ("spec", "parameter", "said"),
    [
        ({"volumes": [{"name": "tmp", "emptyDir": {}}]}, {"empty_dir": True}, "has an emptyDir"),
        ({}, {"bare": True}, "no controller would bring"),
    ],
)
def test_a_pod_that_would_be_lost_keeps_the_node(
    desk: Desk, spec: Mapping[str, Any], parameter: Mapping[str, bool], said: str
) -> None:
    on_nodes(desk)
    if spec:
        desk.kube.deployment(desk.namespace, replicas=1, template={**pinned(desk), **spec})
    else:
        made = pod("shop", spec=pinned(desk))
        made["metadata"]["name"] = "bare"
        desk.api.post(f"{CORE}/namespaces/{desk.namespace}/pods", made)
        eventually(lambda: desk.ready() == 1)
    node = place_of(desk)
    with pytest.raises(RefusedError, match=said):
        desk.run("cordon_drain", node=node)
    assert not is_cordoned(desk, node)
    assert is_done(desk.run("cordon_drain", node=node, **parameter))


def test_a_pod_outside_of_the_fence_keeps_the_node(desk: Desk) -> None:
    on_nodes(desk)
    desk.kube.deployment(desk.namespace, replicas=1, template=pinned(desk))
    node = place_of(desk)
    desk.namespaces = ["elsewhere"]
    with pytest.raises(RefusedError, match=f"the namespace {desk.namespace}"):
        desk.run("cordon_drain", node=node)
    assert not is_cordoned(desk, node)


def test_static_pods_stay(desk: Desk) -> None:
    (node,) = on_nodes(desk, 1)
    made = pod("static", spec={"nodeName": node})
    made["metadata"] |= {"name": "static", "annotations": {"kubernetes.io/config.mirror": "x"}}
    desk.api.post(f"{CORE}/namespaces/{desk.namespace}/pods", made)
    eventually(lambda: desk.ready("static") == 1)
    result = desk.run("cordon_drain", node=node)
    assert is_done(result)
    assert result.plan.facts["staying"] == [f"Pod {desk.namespace}/static: a static pod of the node"]
    assert desk.ready("static") == 1


# Volume claims

GIB = 1 << 30


def growing(desk: Desk, **more: Any) -> dict[str, Any]:
    return desk.in_space(**{"name": "data", "at_most": "4GiB", **more})


def test_a_claim_grows_once(desk: Desk) -> None:
    path = desk.kube.claim(desk.namespace, size="1Gi")
    desk.limited("grow_volume_claim")
    result = desk.run("grow_volume_claim", **growing(desk, percent=50))
    assert is_done(result)
    assert desk.api.get(path)["status"]["capacity"]["storage"] == "1536Mi"
    assert desk.run("grow_volume_claim", **growing(desk, percent=50)).status is Status.NOTHING
    assert playbook("kubernetes.grow_volume_claim").undo_text is None
    desk.incident = "i-two"
    assert is_done(desk.run("grow_volume_claim", **growing(desk, by="512MiB")))
    assert desk.api.get(path)["spec"]["resources"]["requests"]["storage"] == "2Gi"


def test_a_growth_that_was_killed_is_not_made_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    path = desk.kube.claim(desk.namespace, size="1Gi")
    first = desk.action("grow_volume_claim", **growing(desk, percent=100))
    admitted = first.plan()
    kill_before_verify(monkeypatch, first)
    with pytest.raises(KilledError):
        desk.carry_out(first)
    assert desk.action("grow_volume_claim", **growing(desk, percent=100)).plan().changes in ((), admitted.changes)
    assert desk.run("grow_volume_claim", **growing(desk, percent=100)).status in (Status.DONE, Status.NOTHING)
    assert desk.api.get(path)["spec"]["resources"]["requests"]["storage"] == "2Gi"


def test_a_claim_never_grows_beyond_its_maximum(desk: Desk) -> None:
    path = desk.kube.claim(desk.namespace, size="3Gi")
    with pytest.raises(RefusedError, match="it would be 6Gi, and at most 4Gi"):
        desk.run("grow_volume_claim", **growing(desk, percent=100))
    assert desk.api.get(path)["spec"]["resources"]["requests"]["storage"] == "3Gi"


def test_a_class_that_does_not_let_volumes_grow_is_said(desk: Desk) -> None:
    classes = "/apis/storage.k8s.io/v1/storageclasses"
    name = f"fixed-{secrets.token_hex(3)}"
    desk.api.post(classes, {"metadata": {"name": name}, "provisioner": "kubernetes.io/no-provisioner"})
    common = {"accessModes": ["ReadWriteOnce"], "storageClassName": name}
    volume = {
        **common,
        "capacity": {"storage": "1Gi"},
        "claimRef": {"namespace": desk.namespace, "name": "data"},
        "hostPath": {"path": "/x"},
    }
    desk.api.post(f"{CORE}/persistentvolumes", {"metadata": {"name": f"{desk.namespace}-fixed"}, "spec": volume})
    claim = {**common, "volumeName": f"{desk.namespace}-fixed", "resources": {"requests": {"storage": "1Gi"}}}
    desk.api.post(
        f"{CORE}/namespaces/{desk.namespace}/persistentvolumeclaims", {"metadata": {"name": "data"}, "spec": claim}
    )
    eventually(lambda: desk.get("PersistentVolumeClaim", "data")["status"].get("phase") == "Bound")
    with pytest.raises(RefusedError, match=f"its storage class {name} does not allow"):
        desk.run("grow_volume_claim", **growing(desk, percent=10))


def test_a_quota_for_storage_holds(desk: Desk) -> None:
    path = desk.kube.claim(desk.namespace, size="1Gi")
    quotas = f"{CORE}/namespaces/{desk.namespace}/resourcequotas"
    desk.api.post(quotas, {"metadata": {"name": "disk"}, "spec": {"hard": {"requests.storage": "1536Mi"}}})
    eventually(
        lambda: desk.api.get(f"{quotas}/disk").get("status", {}).get("used", {}).get("requests.storage") == "1Gi"
    )
    with pytest.raises(RefusedError, match=r"the quota disk has 512Mi of requests\.storage left, 1Gi more"):
        desk.run("grow_volume_claim", **growing(desk, percent=100))
    assert desk.api.get(path)["spec"]["resources"]["requests"]["storage"] == "1Gi"


def test_whoever_grew_it_meanwhile_is_not_overruled(desk: Desk) -> None:
    path = desk.kube.claim(desk.namespace, size="1Gi")
    action = desk.action("grow_volume_claim", **growing(desk, percent=100))
    change = action.plan().changes[0]
    desk.api.patch(path, {"spec": {"resources": {"requests": {"storage": "3Gi"}}}})
    assert action.apply(change).outcome is Outcome.CONTENDED
    assert desk.api.get(path)["spec"]["resources"]["requests"]["storage"] == "3Gi"


# Finished jobs


def job(desk: Desk, name: str, *, behaviour: str | None = None, owner: Any = None, **spec: Any) -> str:
    template = pod(name, behaviour=behaviour, spec={"restartPolicy": "Never"})
    owners = {"ownerReferences": [owner]} if owner else {}
    jobs = f"{BATCH}/namespaces/{desk.namespace}/jobs"
    desk.api.post(
        jobs, {"metadata": {"name": name, **owners}, "spec": {"backoffLimit": 0, "template": template, **spec}}
    )
    return f"{jobs}/{name}"


def ended(desk: Desk, path: str) -> bool:
    kinds = {
        each["type"] for each in desk.api.get(path).get("status", {}).get("conditions", []) if each["status"] == "True"
    }
    return bool(kinds & {"Complete", "Failed"})


def jobs_left(desk: Desk) -> set[str]:
    jobs = desk.api.items(f"{BATCH}/namespaces/{desk.namespace}/jobs")
    return {each["metadata"]["name"] for each in jobs if "deletionTimestamp" not in each["metadata"]}


def test_old_jobs_go_and_the_newest_and_what_is_not_ours_stay(desk: Desk) -> None:
    cron = {
        "schedule": "0 3 * * *",
        "suspend": True,
        "successfulJobsHistoryLimit": 2,
        "jobTemplate": {"spec": {"template": pod("c", spec={"restartPolicy": "Never"})}},
    }
    made = desk.api.post(
        f"{BATCH}/namespaces/{desk.namespace}/cronjobs", {"metadata": {"name": "nightly"}, "spec": cron}
    )
    by_cron = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "name": "nightly",
        "uid": made["metadata"]["uid"],
        "controller": True,
    }
    keeper = desk.api.post(f"{CORE}/namespaces/{desk.namespace}/configmaps", {"metadata": {"name": "keeper"}})[
        "metadata"
    ]
    foreign = {**by_cron, "apiVersion": "v1", "kind": "ConfigMap", "name": "keeper", "uid": keeper["uid"]}
    paths = [job(desk, f"free-{number}") for number in range(3)]
    paths += [job(desk, "failed", behaviour="failing")]
    paths += [job(desk, "nightly", owner=by_cron), job(desk, "foreign", owner=foreign)]
    for path in paths:
        eventually(lambda path=path: ended(desk, path))
    running = job(desk, "running", behaviour="stuck")
    self_removing = job(desk, "self-removing", ttlSecondsAfterFinished=100000)
    eventually(lambda: ended(desk, self_removing))
    parameters = desk.in_space(keep=1)
    assert desk.run("clean_finished_jobs", **parameters).status is Status.NOTHING  # not old enough
    desk.clock.ahead = timedelta(days=2)
    desk.limited("clean_finished_jobs")
    result = desk.run("clean_finished_jobs", **parameters)
    assert is_done(result)
    left = jobs_left(desk)
    assert len(left & {"free-0", "free-1", "free-2"}) == 1
    assert left >= {"failed", "nightly", "foreign", "running", "self-removing"}
    assert result.plan.population["job"] == 8
    assert desk.api.exists(running)
    assert is_done(desk.run("clean_finished_jobs", **desk.in_space(keep=0, failed=True)))
    assert jobs_left(desk) == {"nightly", "foreign", "running", "self-removing"}


def test_only_so_many_jobs_go_at_once_the_oldest_first(desk: Desk) -> None:
    for path in [job(desk, f"j-{number}") for number in range(4)]:
        eventually(lambda path=path: ended(desk, path))
    desk.clock.ahead = timedelta(days=2)
    result = desk.run("clean_finished_jobs", **desk.in_space(keep=0, at_most=3))
    assert is_done(result)
    assert len(jobs_left(desk)) == 1
    assert result.plan.facts["left_for_next_time"] == 1


def test_a_cleaning_that_was_killed_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in [job(desk, f"j-{number}") for number in range(3)]:
        eventually(lambda path=path: ended(desk, path))
    desk.clock.ahead = timedelta(days=2)
    first = desk.action("clean_finished_jobs", **desk.in_space(keep=0))
    delete, count = first.apply, [0]

    def apply(change: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise KilledError
        return delete(change)

    monkeypatch.setattr(first, "apply", apply)
    with pytest.raises(KilledError):
        desk.carry_out(first)
    assert is_done(desk.run("clean_finished_jobs", **desk.in_space(keep=0)))
    assert jobs_left(desk) == set()


# Certificates


def certificate(names: Sequence[str], *, days: float, key: Any = None, signed_by: Any = None) -> tuple[bytes, bytes]:
    """Certificate and key in PEM, valid for so many days."""
    own = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject, subject, own.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=60)).not_valid_after(now + timedelta(days=days))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
    made = builder.sign(signed_by or own, hashes.SHA256())
    pem = own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made.public_bytes(Encoding.PEM), pem


def put_secret(desk: Desk, parts: tuple[bytes, bytes], **metadata: Any) -> str:
    data = {name: base64.b64encode(value).decode() for name, value in zip(("tls.crt", "tls.key"), parts, strict=True)}
    desk.api.post(
        f"{CORE}/namespaces/{desk.namespace}/secrets",
        {"metadata": {"name": "web-tls", **metadata}, "type": "kubernetes.io/tls", "data": data},
    )
    return desk.path("Secret", "web-tls")


def leaf(desk: Desk, path: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(base64.b64decode(desk.api.get(path)["data"]["tls.crt"]))


NAMES = ["web.shop.example", "www.shop.example"]


@pytest.fixture
def pki(desk: Desk, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A PKI of its own in the key service, with a role, and a login that may just sign. The playbook's parameters."""
    import hvac

    ground.component("vault")
    url = f"http://127.0.0.1:{ground.place.port('vault')}"
    root = hvac.Client(url=url, token=(ground.place.directory / "secrets" / "vault.root_token").read_text(), timeout=20)
    mount, name = f"pki-{secrets.token_hex(4)}", f"ops-{secrets.token_hex(4)}"
    root.sys.enable_secrets_engine("pki", path=mount)
    root.sys.tune_mount_configuration(mount, max_lease_ttl="8760h")
    root.secrets.pki.generate_root("internal", "Tests CA", {"ttl": "8760h"}, mount_point=mount)
    role = {"allowed_domains": "shop.example", "allow_subdomains": True, "max_ttl": "2160h", "key_type": "any"}
    root.secrets.pki.create_or_update_role("web", role, mount_point=mount)
    root.sys.create_or_update_policy(name, f'path "{mount}/sign/web" {{ capabilities = ["update"] }}')
    root.auth.approle.create_or_update_approle(name, token_policies=[name], token_ttl="1h")
    monkeypatch.setenv("PKI_ROLE_ID", root.auth.approle.read_role_id(name)["data"]["role_id"])
    monkeypatch.setenv("PKI_SECRET_ID", root.auth.approle.generate_secret_id(name)["data"]["secret_id"])
    desk.vaults["v"] = {
        "url": url,
        "auth": {"method": "approle", "role_id": "env://PKI_ROLE_ID", "secret_id": "env://PKI_SECRET_ID"},
    }
    return desk.in_space(name="web-tls", vault="v", mount=mount, role="web", ttl="30d", renew_before="7d")


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)], ids=["ec", "rsa"]
)
def test_a_certificate_is_renewed_by_vault_and_put_back(desk: Desk, pki: Mapping[str, Any], key: Any) -> None:
    path = put_secret(desk, certificate(NAMES, days=3, key=key))
    old = leaf(desk, path)
    desk.limited("renew_certificate_secret")
    result = desk.run("renew_certificate_secret", **pki)
    assert is_done(result)
    fresh = leaf(desk, path)
    assert fresh.fingerprint(hashes.SHA256()) != old.fingerprint(hashes.SHA256())
    assert fresh.not_valid_after_utc > datetime.now(UTC) + timedelta(days=29)
    names = fresh.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == set(NAMES)
    assert type(fresh.public_key()) is type(old.public_key())
    assert fresh.public_key() != old.public_key()
    assert desk.run("renew_certificate_secret", **pki).status is Status.NOTHING
    undone = desk.undo("renew_certificate_secret", result, **pki)
    assert is_done(undone)
    assert leaf(desk, path).fingerprint(hashes.SHA256()) == old.fingerprint(hashes.SHA256())


def test_no_key_stands_in_the_ledger(desk: Desk, pki: Mapping[str, Any]) -> None:
    parts = certificate(NAMES, days=3)
    path = put_secret(desk, parts)
    assert is_done(desk.run("renew_certificate_secret", **pki))
    written = str([entry.body for entry in desk.ledger.entries()])
    for pem in (*parts, *(base64.b64decode(value) for value in desk.api.get(path)["data"].values())):
        body = pem.decode().splitlines()[1]
        assert body not in written
        assert base64.b64encode(pem).decode()[:60] not in written
    assert "PRIVATE KEY" not in written


def test_a_renewal_that_was_killed_after_the_write_is_not_made_twice(
    desk: Desk, pki: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put_secret(desk, certificate(NAMES, days=3))
    first = desk.action("renew_certificate_secret", **pki)
    kill_before_verify(monkeypatch, first)
    with pytest.raises(KilledError):
        desk.carry_out(first)
    fresh = leaf(desk, path)
    assert desk.run("renew_certificate_secret", **pki).status is Status.NOTHING
    assert leaf(desk, path) == fresh


def test_a_secret_that_changed_between_plan_and_apply_is_left_alone(desk: Desk, pki: Mapping[str, Any]) -> None:
    path = put_secret(desk, certificate(NAMES, days=3))
    action = desk.action("renew_certificate_secret", **pki)
    change = action.plan().changes[0]
    other = certificate(NAMES, days=90)
    data = {name: base64.b64encode(value).decode() for name, value in zip(("tls.crt", "tls.key"), other, strict=True)}
    desk.api.patch(path, {"data": data})
    assert (found := action.check(change)) is not None
    assert found.outcome is Outcome.CONTENDED
    assert action.apply(change).outcome is Outcome.CONTENDED
    assert desk.api.get(path)["data"] == data


def test_a_name_that_the_role_does_not_sign_changes_nothing(desk: Desk, pki: Mapping[str, Any]) -> None:
    path = put_secret(desk, certificate(["web.elsewhere.example"], days=3))
    before = desk.api.get(path)["data"]
    result = desk.run("renew_certificate_secret", **pki)
    assert result.status is Status.FAILED
    assert "not allowed by this role" in why(result)
    assert desk.api.get(path)["data"] == before


def test_a_certificate_that_lives_on_is_left_alone(desk: Desk, pki: Mapping[str, Any]) -> None:
    put_secret(desk, certificate(NAMES, days=80))
    assert desk.run("renew_certificate_secret", **pki).status is Status.NOTHING


def test_an_old_certificate_that_has_ended_is_not_put_back(desk: Desk, pki: Mapping[str, Any]) -> None:
    path = put_secret(desk, certificate(NAMES, days=3))
    result = desk.run("renew_certificate_secret", **pki)
    assert is_done(result)
    fresh = leaf(desk, path)
    desk.clock.ahead = timedelta(days=4)
    assert outcomes(desk.undo("renew_certificate_secret", result, **pki)) == ["contended"]
    assert leaf(desk, path) == fresh


@pytest.mark.parametrize(
    ("change", "said"), [({"immutable": True}, "is immutable"), ({"role": None}, "vault and role are not given")]
)
def test_a_secret_that_cannot_be_renewed_is_said(
    desk: Desk, pki: Mapping[str, Any], change: Mapping[str, Any], said: str
) -> None:
    path = put_secret(desk, certificate(NAMES, days=3))
    if "immutable" in change:
        desk.api.patch(path, change)
    parameters = {key: value for key, value in pki.items() if key not in change}
    with pytest.raises(RefusedError, match=said):
        desk.run("renew_certificate_secret", **parameters)


CERT_MANAGER: dict[str, Any] = {
    "metadata": {"name": "certificates.cert-manager.io"},
    "spec": {
        "group": "cert-manager.io",
        "names": {"kind": "Certificate", "plural": "certificates", "singular": "certificate", "listKind": "CertificateList"},
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1", "served": True, "storage": True, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}  # fmt: skip


def test_a_certificate_of_cert_manager_is_issued_by_cert_manager(desk: Desk) -> None:
    desk.kube.custom_resource(CERT_MANAGER)
    path = put_secret(desk, certificate(NAMES, days=3), annotations={"cert-manager.io/certificate-name": "web"})
    certificates = f"/apis/cert-manager.io/v1/namespaces/{desk.namespace}/certificates"
    body = {
        "apiVersion": "cert-manager.io/v1",
        "kind": "Certificate",
        "metadata": {"name": "web"},
        "spec": {"secretName": "web-tls"},
    }
    desk.api.post(certificates, body)
    ready = {"type": "Ready", "status": "True", "reason": "Ready", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    desk.api.patch(f"{certificates}/web/status", {"status": {"conditions": [ready]}})
    asked: list[Any] = []

    def manage() -> bool:
        conditions = desk.api.get(f"{certificates}/web")["status"]["conditions"]
        issuing = [each for each in conditions if each["type"] == "Issuing"]
        if not issuing:
            return False
        asked.extend(conditions)
        fresh = certificate(NAMES, days=90)
        data = {
            name: base64.b64encode(value).decode() for name, value in zip(("tls.crt", "tls.key"), fresh, strict=True)
        }
        desk.api.patch(path, {"data": data})
        desk.api.patch(f"{certificates}/web/status", {"status": {"conditions": [ready]}})
        return True

    desk.limited("renew_certificate_secret")
    with playing(manage):
        result = desk.run("renew_certificate_secret", **desk.in_space(name="web-tls"))
    assert is_done(result)
    assert [each["type"] for each in asked] == ["Ready", "Issuing"]
    assert (asked[1]["status"], asked[1]["reason"]) == ("True", "ManuallyTriggered")
    assert desk.run("renew_certificate_secret", **desk.in_space(name="web-tls")).status is Status.NOTHING


def test_a_cert_manager_that_does_nothing_is_no_success(desk: Desk) -> None:
    desk.kube.custom_resource(CERT_MANAGER)
    put_secret(desk, certificate(NAMES, days=3), annotations={"cert-manager.io/certificate-name": "web"})
    body = {
        "apiVersion": "cert-manager.io/v1",
        "kind": "Certificate",
        "metadata": {"name": "web"},
        "spec": {"secretName": "web-tls"},
    }
    desk.api.post(f"/apis/cert-manager.io/v1/namespaces/{desk.namespace}/certificates", body)
    result = desk.run("renew_certificate_secret", **desk.in_space(name="web-tls", within="1s"))
    assert result.status is Status.FAILED
    assert "still the old one" in why(result)


# Rights


def make_deployment(desk: Desk) -> dict[str, Any]:
    desk.kube.deployment(desk.namespace, replicas=1)
    return desk.in_space(name="shop")


def make_bad_release(desk: Desk) -> dict[str, Any]:
    desk.kube.deployment(desk.namespace, replicas=1)
    roll_out(desk, "shop:2", "unready")
    in_vain(desk)
    return desk.in_space(name="shop")


def make_scalable(desk: Desk) -> dict[str, Any]:
    return make_deployment(desk) | {"replicas": 2, "at_most": 5}


def make_autoscaled(desk: Desk) -> dict[str, Any]:
    parameters = make_scalable(desk) | {"through_autoscaler": True}
    autoscale(desk)
    return parameters


def make_rollout(desk: Desk) -> dict[str, Any]:
    rollout(desk)
    return desk.in_space(name="shop", within="1s")


def make_crashing(desk: Desk) -> dict[str, Any]:
    return desk.in_space(name=behaving(desk, "crashing")["metadata"]["name"])


def make_unending(desk: Desk) -> dict[str, Any]:
    name = ends_never(desk)
    desk.clock.ahead = timedelta(minutes=11)
    return desk.in_space(name=name, force=True)


def make_occupied(desk: Desk) -> dict[str, Any]:
    on_nodes(desk)
    desk.kube.deployment(desk.namespace, replicas=1, template=pinned(desk))
    return {"node": place_of(desk)}


def make_claim(desk: Desk) -> dict[str, Any]:
    desk.kube.claim(desk.namespace)
    return growing(desk, percent=10)


def make_old_job(desk: Desk) -> dict[str, Any]:
    path = job(desk, "old")
    eventually(lambda: ended(desk, path))
    desk.clock.ahead = timedelta(days=2)
    return desk.in_space(keep=0)


@pytest.mark.parametrize(
    ("name", "make", "missing"),
    [
        ("rollout_restart", make_deployment, "apps/deployments: get"),
        ("rollout_restart", make_deployment, "apps/deployments: patch"),
        ("rollout_restart", make_deployment, "core/pods: list"),
        ("rollback", make_bad_release, "apps/deployments: get"),
        ("rollback", make_bad_release, "apps/deployments: patch"),
        ("rollback", make_bad_release, "apps/replicasets: list"),
        ("rollback", make_bad_release, "apps/replicasets: get"),
        ("rollback", make_bad_release, "core/pods: list"),
        ("scale", make_scalable, "apps/deployments: get"),
        ("scale", make_scalable, "apps/deployments: patch"),
        ("scale", make_scalable, "autoscaling/horizontalpodautoscalers: list"),
        ("scale", make_scalable, "core/resourcequotas: list"),
        ("scale", make_scalable, "core/pods: list"),
        ("scale", make_autoscaled, "autoscaling/horizontalpodautoscalers: get"),
        ("scale", make_autoscaled, "autoscaling/horizontalpodautoscalers: patch"),
        ("argo_abort", make_rollout, "argoproj.io/rollouts: get"),
        ("argo_abort", make_rollout, "argoproj.io/rollouts/status: patch"),
        ("argo_abort", make_rollout, "core/pods: list"),
        ("delete_stuck_pod", make_crashing, "core/pods: get"),
        ("delete_stuck_pod", make_crashing, "core/pods: list"),
        ("delete_stuck_pod", make_crashing, "core/pods: delete"),
        ("delete_stuck_pod", make_unending, "cluster core/nodes: get"),
        ("cordon_drain", make_occupied, "cluster core/nodes: get"),
        ("cordon_drain", make_occupied, "cluster core/nodes: list"),
        ("cordon_drain", make_occupied, "cluster core/nodes: patch"),
        ("cordon_drain", make_occupied, "cluster core/pods: get"),
        ("cordon_drain", make_occupied, "cluster core/pods: list"),
        ("cordon_drain", make_occupied, "cluster core/pods/eviction: create"),
        ("grow_volume_claim", make_claim, "core/persistentvolumeclaims: get"),
        ("grow_volume_claim", make_claim, "core/persistentvolumeclaims: patch"),
        ("grow_volume_claim", make_claim, "core/resourcequotas: list"),
        ("grow_volume_claim", make_claim, "cluster storage.k8s.io/storageclasses: get"),
        ("clean_finished_jobs", make_old_job, "batch/jobs: get"),
        ("clean_finished_jobs", make_old_job, "batch/jobs: list"),
        ("clean_finished_jobs", make_old_job, "batch/jobs: delete"),
        ("clean_finished_jobs", make_old_job, "batch/cronjobs: list"),
    ],
)
def test_one_missing_verb_is_named(desk: Desk, name: str, make: Callable[[Desk], dict[str, Any]], missing: str) -> None:
    """So every right is needed, and whoever forgot one is told which."""
    parameters = make(desk)
    desk.limited(name, without=missing)
    try:
        result = desk.run(name, **parameters)
    except AccessDeniedError as error:
        said = str(error)
    else:
        assert not result.ok
        said = why(result)
    # What is asked in one namespace is refused for that one, although the whole cluster is needed.
    assert any(f"give it the rule '{rule}'" in said for rule in (missing, missing.removeprefix("cluster "))), said


@pytest.mark.parametrize("missing", ["core/secrets: get", "core/secrets: create", "core/secrets: patch"])
def test_one_missing_verb_of_a_renewal_is_named(desk: Desk, pki: Mapping[str, Any], missing: str) -> None:
    path = put_secret(desk, certificate(NAMES, days=3))
    before = desk.api.get(path)["data"]
    desk.limited("renew_certificate_secret", without=missing)
    try:
        said = why(desk.run("renew_certificate_secret", **pki))
    except OpsError as error:
        said = str(error)
    assert f"give it the rule '{missing}'" in said
    assert desk.api.get(path)["data"] == before
