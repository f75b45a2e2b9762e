"""Looks at what the targets share: the ledger, its checkpoints, and what remediation listens to and speaks with. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from ops_platform.doctor import Examination, Found, asked
from ops_platform.errors import OpsError
from ops_platform.inventory.values import SecretRef

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.inventory.model import LedgerCheckpoints
    from ops_platform.inventory.remediation import Chat, EventSource, Remediation, Rule
    from ops_platform.inventory.systems import AlertmanagerSystem, KafkaSystem

NAME = "platform"


def examine_platform(access: Access) -> Examination:
    """Every part is asked, whatever the others answered. Without ledger and remediation there is nothing to find."""
    inventory = access.inventory
    parts: list[tuple[str, Callable[[], Iterator[Found]]]] = []
    if inventory.platform.database is not None:
        parts.append(("ledger", lambda: _ledger(access)))
    if (checkpoints := inventory.platform.ledger) is not None:
        parts.append(("checkpoint key", lambda: _signer(access, checkpoints)))
        parts.append(("checkpoint store", lambda: _checkpoint_store(access, checkpoints)))
    if inventory.platform.dagster is not None:
        parts.append(("Dagster", lambda: _dagster(access)))
    if (remediation := inventory.remediation) is not None:
        parts += _remediation(access, remediation)
    return Examination(NAME, asked(parts))


# The ledger

_LEDGER = """
select current_user, (select rolsuper from pg_roles where rolname = current_user), has_database_privilege(current_database(), 'create'),
  to_regnamespace('ops_remediation') is not null
"""
_RIGHTS = """
select has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'insert'),
  pg_has_role(c.relowner, 'usage') or has_table_privilege(c.oid, 'update') or has_table_privilege(c.oid, 'delete')
    or has_table_privilege(c.oid, 'truncate')
from pg_class c where c.oid = 'ops_ledger.entries'::regclass
"""


def _ledger(access: Access) -> Iterator[Found]:
    from ops_platform.ledger.ledger import Reading
    from ops_platform.ledger.schema import version

    with closing(access.platform_db()) as connection:
        role, superuser, creates, _ = connection.execute(_LEDGER).fetchone() or (None,) * 4
        if not version(connection):
            yield Found(
                "ledger",
                "warn" if creates else "bad",
                "is not there yet" + ("" if creates else f", and {role} may not make it"),
                "it is made at its first use"
                if creates
                else f"GRANT CREATE ON DATABASE to {role}, or make it as its owner",
            )
            return
        writes, rewrites = connection.execute(_RIGHTS).fetchone() or (False, True)
        yield Found(
            "ledger",
            "good" if writes else "bad",
            "can be read and written" if writes else f"{role} may not write it",
            f"GRANT USAGE ON SCHEMA ops_ledger and SELECT, INSERT ON ops_ledger.entries to {role}",
        )
        yield Found(
            "rights on the ledger",
            "warn" if superuser or rewrites else "good",
            f"{role} is a superuser"
            if superuser
            else f"{role} may rewrite or unlock it"
            if rewrites
            else f"{role} may only add to it",
            "give the schema ops_ledger to another role, which nobody logs in with (docs/reference/ledger-threat-model.md); "
            "until then checkpoints alone show that it was rewritten",
        )
        off = Reading(connection).unprotected()
        yield Found(
            "triggers of the ledger",
            "bad" if off else "good",
            "; ".join(off) or "always on",
            "find out who did that; then ops ledger verify, and ALTER TABLE ops_ledger.entries ENABLE ALWAYS TRIGGER …",
        )
    if access.inventory.platform.ledger is None:
        yield Found(
            "checkpoints",
            "warn",
            "none are declared: a ledger that is rewritten whole looks good",
            "declare platform.ledger (docs/reference/ledger.md)",
        )


def _signer(access: Access, checkpoints: LedgerCheckpoints) -> Iterator[Found]:
    """Raises OpsError for a key that is not there, or not of type ed25519."""
    from ops_platform.ledger.dsse import verify

    signer = access.signer(checkpoints)
    keys = signer.public_keys()
    newest, message = list(keys)[-1], b"ops doctor"
    signature = signer.sign(message, newest)
    good = signature is not None and verify(keys[newest], message, signature)
    yield Found(
        "checkpoint key",
        "good" if good else "bad",
        f"{signer.name}, ed25519, {newest} signs" if good else f"{newest} does not sign",
        f"the role needs update on {checkpoints.mount}/sign/{checkpoints.key}; look at min_encryption_version",
    )


def _checkpoint_store(access: Access, checkpoints: LedgerCheckpoints) -> Iterator[Found]:
    lock = checkpoints.object_lock or access.inventory.stores[checkpoints.store].object_lock
    store = access.checkpoint_store(checkpoints)
    bucket = store.check().get("object_lock")
    yield Found("checkpoint store", "good", f"{store.name} can be written and read")
    if lock is None:
        yield Found(
            "checkpoints' Object Lock",
            "warn",
            "none is declared: whoever may write the bucket can hide them for good",
            "declare platform.ledger.object_lock, with a bucket that has Object Lock",
        )
        return
    known = bucket in ("Enabled", "off")
    yield Found(
        "checkpoints' Object Lock",
        "good" if bucket == "Enabled" else "bad" if known else "unknown",
        f"{lock.mode} is declared, and the bucket's lock is {'on' if bucket == 'Enabled' else bucket}",
        "make a bucket with Object Lock: it cannot be turned on later everywhere"
        if known
        else "let the role ask for the bucket's Object Lock (s3:GetBucketObjectLockConfiguration)",
    )


# Dagster

_WATCHED = ("alerts", "events", "incidents", "publish", "ledger_checkpoints")


def _dagster(access: Access) -> Iterator[Found]:
    """Whether what must run is on, and how its newest tick went."""
    from ops_platform.metrics.collect import read_dagster

    found = {(metric, labels[0]): value for metric, labels, value in read_dagster(access) if labels}
    for name in sorted(name for metric, name in found if metric == "ops_instigator_running"):
        if not name.startswith(_WATCHED):
            continue
        on = found["ops_instigator_running", name] == 1
        failed = found.get(("ops_tick_failed", name)) == 1
        yield Found(
            f"Dagster: {name}",
            "bad" if not on or failed else "good",
            "is off" if not on else "its newest tick failed" if failed else "is on",
            "switch it on, on its page in the web UI" if not on else "read the tick's error on its page in the web UI",
        )


# Remediation


def _remediation(access: Access, remediation: Remediation) -> list[tuple[str, Callable[[], Iterator[Found]]]]:
    from ops_platform.inventory.systems import AlertmanagerSystem, KafkaSystem

    inventory = access.inventory
    parts: list[tuple[str, Callable[[], Iterator[Found]]]] = [("rules", lambda: _rules(access))]
    if inventory.platform.database is not None:
        parts.append(("incidents", lambda: _tables(access)))
    for name in remediation.alertmanagers:
        system = inventory.system(name, AlertmanagerSystem)
        parts.append((f"Alertmanager {name}", lambda system=system: _alertmanager(access, system)))
    for source in remediation.events:
        parts.append((f"Kafka {source.kafka}", lambda source=source: _events(access, source)))
    if (publish := remediation.publish) is not None:
        kafka = inventory.system(publish.kafka, KafkaSystem)
        parts.append((f"Kafka {kafka.id}", lambda: _topics(access, kafka, [publish.topic])))
    for name in sorted({rule.verify.metric.prometheus for rule in remediation.rules if rule.verify.metric}):
        parts.append((f"Prometheus {name}", lambda name=name: _prometheus(access, name)))
    for rule in remediation.rules:
        if rule.playbook == "http.webhook" and isinstance(secret := rule.parameters.get("secret"), str):
            parts.append((f"webhook of {rule.id}", lambda rule=rule, secret=secret: _webhook(access, rule, secret)))
    if (chat := remediation.slack) is not None:
        parts.append(("Slack", lambda: _slack(access, chat)))
    return parts


def _rules(access: Access) -> Iterator[Found]:
    from ops_platform.remediation.rules import problems, remediation_of

    wrong = problems(access.inventory)
    count = len(remediation_of(access.inventory).rules)
    yield Found("rules", "bad" if wrong else "good", "; ".join(wrong) or f"{count}, all good", "ops rules check")


_TABLES = """
select bool_and(has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'insert')), count(*)
from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = 'ops_remediation' and c.relkind = 'r'
"""


def _tables(access: Access) -> Iterator[Found]:
    with closing(access.platform_db()) as connection:
        role, _, creates, _ = connection.execute(_LEDGER).fetchone() or (None,) * 4
        writes, count = connection.execute(_TABLES).fetchone() or (False, 0)
    if not count:
        yield Found(
            "tables of incidents",
            "warn" if creates else "bad",
            "are not there yet" + ("" if creates else f", and {role} may not make them"),
            "they are made at their first use" if creates else f"GRANT CREATE ON DATABASE to {role}",
        )
        return
    yield Found(
        "tables of incidents",
        "good" if writes else "bad",
        f"{count}, ours to write" if writes else f"{role} may not write all of them",
        f"give the schema ops_remediation to {role}",
    )


def _alertmanager(access: Access, system: AlertmanagerSystem) -> Iterator[Found]:
    from ops_platform.clients.alertmanager import WATCHDOG_REMEDY

    name = f"Alertmanager {system.id}"
    polled = access.alertmanager(system).poll()
    for member in polled.members:
        away = member.failure
        yield Found(
            f"{name}, {member.url}",
            "warn" if away else "good",
            away.what if away else f"lists {member.alerts} alerts",
            (away.remedy if away else None) or "look whether it runs; the others count, and nothing ends meanwhile",
        )
    if system.watchdog is None:
        yield Found(
            f"{name}, watchdog",
            "warn",
            "none is declared: an alerting that has broken looks like alerts that ended, and what was done for them like help",
            "declare `watchdog`, with an alert that always fires (docs/how-to/turn-alerts-into-action.md)",
        )
        return
    seen = polled.sees_watchdog
    yield Found(f"{name}, watchdog", "good" if seen else "bad", polled.doubt or "fires", WATCHDOG_REMEDY)


def _events(access: Access, source: EventSource) -> Iterator[Found]:
    from ops_platform.events.reader import open_reader
    from ops_platform.inventory.systems import KafkaSystem

    system = access.inventory.system(source.kafka, KafkaSystem)
    yield from _topics(access, system, [*source.topics, source.dead_letter])
    with open_reader(access, source):  # reads the schemas' files
        yield Found(f"Kafka {system.id}, schemas", "good", f"{len(source.schemas)} are declared, all can be read")
    if (registry := access.schema_registry(system)) is not None:
        registry.request("GET", "/subjects")
        yield Found(f"Kafka {system.id}, schema registry", "good", "answers")


def _topics(access: Access, system: KafkaSystem, names: list[str]) -> Iterator[Found]:
    """Each for itself: of several missing ones every one is named."""
    from ops_platform.clients.kafka import Said
    from ops_platform.errors import NotThereError

    kafka, said = access.kafka(system), Said()
    admin = kafka.admin(said)
    for name in names:
        what = f"Kafka {system.id}, topic {name}"
        try:
            topic = kafka.topics(admin, said, [name])[name]
        except NotThereError:
            yield Found(what, "bad", "does not exist", "make it: no topic is ever made by us")
            continue
        parts = len(topic.partitions)
        yield Found(
            what,
            "warn" if topic.leaderless else "good",
            f"{len(topic.leaderless)} of {parts} partitions have no leader"
            if topic.leaderless
            else f"{parts} partition{'s' * (parts != 1)}",
            "look whether all brokers run",
        )


def _prometheus(access: Access, name: str) -> Iterator[Found]:
    from ops_platform.inventory.systems import PrometheusSystem

    access.prometheus(access.inventory.system(name, PrometheusSystem)).query("vector(1)")
    yield Found(f"Prometheus {name}", "good", "answers")


def _slack(access: Access, chat: Chat) -> Iterator[Found]:
    yield _buttons(access, chat)
    slack = access.slack()
    assert slack is not None  # noqa: S101 - the inventory has one
    yield Found("Slack", "good", f"knows the bot: {slack.who()}")


def _buttons(access: Access, chat: Chat) -> Found:
    name = "Slack, buttons"
    if chat.signing_secret is None:
        return Found(name, "warn", "none: approvals are given by ops incidents approve alone", "declare signing_secret")
    return _signing(access, name, chat.signing_secret)


def _webhook(access: Access, rule: Rule, secret: str) -> Iterator[Found]:
    """Asked now, and not when the incident is there that it has to sign for. What is no reference is said of the rules already."""
    with suppress(ValueError):
        yield _signing(access, f"webhook of {rule.id}", SecretRef.parse(secret))


def _signing(access: Access, name: str, secret: SecretRef) -> Found:
    try:
        access.secret(secret)
    except OpsError as error:
        return Found(name, "bad", f"its signing secret {secret} cannot be had: {error.what}", error.remedy)
    return Found(name, "good", "its signing secret can be had")
