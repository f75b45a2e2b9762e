"""A client that stands beside a primary: in whose network its connections are, and what it takes for an acknowledgement."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from ops_platform.clients.listeners import network_of
from ops_platform.clients.processes import Process, identify
from ops_platform.clients.wires import network_kept, within_network
from ops_platform.drills.askers import TABLE, Refused, WrongSideAsker
from ops_platform.drills.steps.postgres import make_table
from ops_platform.errors import CouldNotVerifyError
from tests.network_rig import allowed, network
from tests.rig import Cluster, Platform, eventually, missing

WAITS = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'"


@contextmanager
def asker(cluster: Cluster, platform: Platform) -> Iterator[WrongSideAsker]:
    """Beside the cluster, whose commits wait for a replica that it does not have."""
    if not allowed():
        missing("joining a network", "it takes root, iproute2 and nsenter")
    with cluster.server.connect("postgres") as connection:
        make_table(connection)
        connection.execute("grant usage on schema ops_canary to ops_backup")
        connection.execute(f"grant insert on {TABLE} to ops_backup")
        connection.execute("alter role ops_backup set client_min_messages = 'error'")
    ours = identify(os.getpid())
    assert ours is not None
    where = {
        "writer": "w",
        "host": "127.0.0.1",
        "address": "127.0.0.1",
        "port": cluster.port,
        "pid": ours.pid,
        "started": ours.started,
    }
    cluster.sql("alter system set synchronous_standby_names = 'nobody'")
    cluster.sql("select pg_reload_conf()")
    yield WrongSideAsker(platform.access, SimpleNamespace(subject="app-db"), where, 0.3)  # type: ignore[arg-type]


@asynccontextmanager
async def hanging(asker: WrongSideAsker, cluster: Cluster) -> AsyncIterator[asyncio.Task[None]]:
    """A commit that waits, for longer than a connection may take."""
    work = [asyncio.create_task(one) for one in asker.work()]
    attempt = asyncio.create_task(asker.attempt(1))
    await asyncio.to_thread(eventually, lambda: cluster.sql(WAITS) == 1, why="it does not wait for a replica")
    done, _ = await asyncio.wait([attempt], timeout=asker.timeout * 3)
    assert not done
    yield attempt
    for one in work:
        one.cancel()


def test_an_acknowledgement_that_comes_late_is_one(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    cluster = new_cluster(18)

    async def late(asker: WrongSideAsker) -> None:
        async with hanging(asker, cluster) as attempt:
            cluster.sql("alter system set synchronous_standby_names = ''")
            cluster.sql("select pg_reload_conf()")
            async with asyncio.timeout(30):
                await attempt

    with asker(cluster, new_platform({"app-db": [cluster]})) as found:
        asyncio.run(late(found))


def test_an_answer_that_a_cancelled_wait_lets_go_is_no_acknowledgement(
    new_cluster: Callable[..., Cluster], new_platform: Callable[..., Platform]
) -> None:
    """Also where the login has warnings kept from it."""
    cluster = new_cluster(18)

    async def cancelled(asker: WrongSideAsker) -> None:
        async with hanging(asker, cluster) as attempt:
            cluster.sql("select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'")
            with pytest.raises(Refused, match="whether a replica has it was not waited for"):
                async with asyncio.timeout(30):
                    await attempt

    with asker(cluster, new_platform({"app-db": [cluster]})) as found:
        asyncio.run(cancelled(found))


def test_what_is_made_within_a_network_is_there_and_we_stay_where_we_are() -> None:
    ours = network_of()
    with network() as net:
        if net is None:
            missing("a network of its own", "making one takes root, iproute2 and nsenter")
        assert net is not None
        place = net.place()
        holder = int(place.within[1].split("/")[2])
        process = identify(holder)
        assert process is not None
        kept = network_kept(process)
        try:
            assert within_network(kept, network_of) == network_of(holder) != ours
            with within_network(kept, lambda: socket.create_server((place.host, 0))) as server:
                socket.create_connection((place.host, server.getsockname()[1]), timeout=10).close()
        finally:
            os.close(kept)
        with pytest.raises(CouldNotVerifyError, match="it is gone"):
            network_kept(Process(process.pid, process.started + 1))
    assert network_of() == ours
    with pytest.raises(CouldNotVerifyError, match="may not be seen"):
        network_kept(Process(int(Path("/proc/sys/kernel/pid_max").read_text()), 1))


def test_what_is_no_network_is_not_joined(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(CouldNotVerifyError, match="may not be joined: Invalid"):
        within_network(file.fileno(), lambda: None)
