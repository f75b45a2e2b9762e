"""`ops events`."""

from __future__ import annotations

from typing import Any

import click

from ops_platform.cli.common import (
    Commands,
    action_exit_code,
    actor,
    emit,
    json_option,
    opened,
    show_action,
    table,
)
from ops_platform.errors import UsageError


@click.group(cls=Commands)
def events() -> None:
    """The events that are read from Kafka."""


@events.group(cls=Commands)
def cursor() -> None:
    """Where reading stands, as the sensor's cursor says and as the brokers do. Needs platform.dagster, or a running `ops ui`."""


@cursor.command()
@json_option
@click.pass_context
def show(ctx: click.Context, as_json: bool) -> None:
    """Each topic: goes on, is not begun, has a gap, or stands until a person decides.

    Exit 1 where one stands, 3 where one could not be looked at.
    """
    from ops_platform.events.reset import STANDS, UNKNOWN, TopicStanding, sensors, standing

    with opened() as access:
        found = [topic for sensor in sensors(access) for topic in standing(sensor)]
    if as_json:
        emit(list[TopicStanding], found)
    else:
        rows = [
            [topic.sensor, topic.topic, str(part.partition), *map(_number, (part.next, part.low, part.high))]
            for topic in found
            for part in topic.partitions
        ]
        table(rows, ["sensor", "topic", "partition", "next", "from", "to"])
        for topic in found:
            click.echo(f"{topic.topic}: {topic.state}" + (f": {topic.why}" if topic.why else ""))
    states = {topic.state for topic in found}
    ctx.exit(1 if STANDS in states else 3 if UNKNOWN in states else 0)


@cursor.command()
@click.argument("topic")
@click.option(
    "--at",
    "places",
    multiple=True,
    metavar="PARTITION=OFFSET",
    help="Go on at this offset. Without it the topic is forgotten, and begins as `start` in the inventory says.",
)
@click.option("--sensor", help="Where several sensors read the topic.")
@click.option("--enforce", is_flag=True, help="Do it; needs --approve.")
@click.option("--approve", metavar="DIGEST", help="Exactly this plan, as an earlier call printed it.")
@json_option
@click.pass_context
def reset(
    ctx: click.Context,
    topic: str,
    places: tuple[str, ...],
    sensor: str | None,
    enforce: bool,
    approve: str | None,
    as_json: bool,
) -> None:
    """Begin TOPIC anew, or go on at other offsets. Says what would be done, unless --enforce comes with the plan's digest.

    The sensor has to be off. Exit 1 where it was refused, failed or left something out, 3 where nobody could look whether it holds.
    """
    from ops_platform.events.reset import reset as run

    with opened() as access:
        result = run(
            access, topic, _offsets(places), sensor=sensor, enforce=enforce, approve=approve, actor=actor()
        )  # fmt: skip
    if as_json:
        emit(dict[str, Any], result.as_json())
    else:
        show_action(topic, result)
        for part, words in result.plan.facts["partitions"].items():
            click.echo(f"  partition {part}: {words}")
    ctx.exit(action_exit_code(result))


def _offsets(places: tuple[str, ...]) -> dict[int, int]:
    found: dict[int, int] = {}
    for place in places:
        part, _, at = place.partition("=")
        if not (part.isdecimal() and at.isdecimal()) or int(part) in found:
            raise UsageError(
                f"--at: {place!r} is not PARTITION=OFFSET, each partition once", remedy="write --at 0=1203"
            )
        found[int(part)] = int(at)
    return found


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
