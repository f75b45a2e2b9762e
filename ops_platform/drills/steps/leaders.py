"""Whether two servers of a cluster lead at once: by the servers' own word as well as Patroni's, which may be dead beside a primary that takes writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import timedelta

from ops_platform.clients.postgres import ask_member
from ops_platform.drills.model import Checked, Confidence, Measured
from ops_platform.drills.registry import Context
from ops_platform.errors import OpsError

QUERY = "pg_is_in_recovery() of each server, GET /patroni of each member"
_CONNECTS_WITHIN = 2  # seconds


class TwoLeaders:
    """Looks again and again. `by_patroni`: whom it calls a leader that runs, now."""

    def __init__(self, context: Context, by_patroni: Callable[[], Collection[str]]) -> None:
        self.context, self.by_patroni = context, by_patroni
        self.login = replace(context.access.login(context.target.connection), connect_timeout=_CONNECTS_WITHIN)
        self.who: set[str] = set()
        self.before = context.clock.monotonic()  # the last look that saw one at most before two were seen
        self.after: float | None = None  # the first such look after it
        self.until = self.before

    def look(self) -> None:
        two = self._two()
        now = self.context.clock.monotonic()
        if two:
            self.who |= two
            self.after, self.until = None, now
        elif not self.who:
            self.before = now
        elif self.after is None:
            self.after = now

    @property
    def seconds(self) -> float:
        """At most: from the look before the first that saw two to the one after the last."""
        return (self.after or self.until) - self.before if self.who else 0.0

    def _two(self) -> set[str]:
        """Who leads is asked one after the other: those that lead before and after the others were asked led at once."""
        for leading in (self._by_servers, self.by_patroni):
            if len(first := set(leading())) > 1 and len(both := first & set(leading())) > 1:
                return both
        return set()

    def _by_servers(self) -> Collection[str]:
        found: list[str] = []
        for place in self.context.target.connection.hosts:
            host, port = self.context.access.address(place.host, place.port)
            with contextlib.suppress(OpsError):
                member = ask_member(self.login, host, port)
                if member.error is None and member.in_recovery is False:
                    found.append(f"{host}:{port}")
        return found

    def check(self, most: timedelta) -> Checked:
        """Two that were seen for no measurable time were seen."""
        allowed = most / timedelta(seconds=1)
        said = (
            f"{' and '.join(sorted(self.who))} led at once, for {self.seconds:.1f} s at most; {allowed:.0f} s are allowed"
            if self.who
            else "no two were seen that led"
        )
        holds = not self.who or (allowed > 0 and self.seconds <= allowed)
        return Checked(title="One leads at a time", holds=holds, query=QUERY, result=said)

    def measured(self) -> Measured:
        return Measured(
            name="two_leaders", value=round(self.seconds, 3), confidence=Confidence.BOUND,
            how="at most so long two led at once, once the old one was back",
        )  # fmt: skip
