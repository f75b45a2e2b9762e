"""What people look at: the scorecard in the terminal, HTML pages, progress. The face of the room.

`terminal` prints, `progress` draws while bytes move, `html` makes the pages. Everything here only reads: the records come
from `recovery.model` and `backup.model`, and nothing is asked of a live system.
"""

from ops_platform.reports.html import Row, index_report, target_report, write_report
from ops_platform.reports.progress import progress_bar
from ops_platform.reports.terminal import backups_table, print_scorecard, window_lines

__all__ = [
    "Row",
    "backups_table",
    "index_report",
    "print_scorecard",
    "progress_bar",
    "target_report",
    "window_lines",
    "write_report",
]
