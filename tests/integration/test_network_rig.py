"""The networks of tests: what a run that was killed has left goes with the next one, and nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack

import pytest

from tests.network_rig import allowed, ip, remove_abandoned


def links() -> set[str]:
    return {link["ifname"] for link in json.loads(ip("-json", "link"))}


def test_links_of_a_dead_process_alone_are_removed() -> None:
    if not allowed():
        pytest.skip("making networks takes root")
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = f"ops{gone.pid}x0"
    kept = {f"ops{os.getpid()}x0", f"opz{gone.pid}x0", f"ops{gone.pid}x0y"}  # of a living one, and of somebody else
    with ExitStack() as stack:
        for name in (dead, *sorted(kept)):
            ip("link", "add", name, "type", "bridge")
            stack.callback(subprocess.run, ["ip", "link", "delete", name], check=False, capture_output=True)
        ip("link", "add", f"{dead}n1", "type", "veth", "peer", "name", f"opz{gone.pid}w")
        stack.callback(subprocess.run, ["ip", "link", "delete", f"{dead}n1"], check=False, capture_output=True)
        remove_abandoned()
        assert kept <= links()
        assert not {dead, f"{dead}n1"} & links()
