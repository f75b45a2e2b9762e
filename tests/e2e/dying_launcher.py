"""A run launcher that dies at the first run it is given, as `kill -9` of the daemon between the stored cursor and the launch."""

import os
import signal
from pathlib import Path
from typing import Any

from dagster._core.launcher import DefaultRunLauncher, LaunchRunContext


class DyingLauncher(DefaultRunLauncher):
    def launch_run(self, context: LaunchRunContext) -> Any:
        mark = Path(os.environ["DAGSTER_HOME"]) / "died"
        if not mark.exists():
            mark.write_text(context.dagster_run.run_id)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().launch_run(context)
