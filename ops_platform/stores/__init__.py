"""Every store but PostgreSQL: dumped into the same repository, restored into a sandbox, its data looked at.

It stands on `backup` (blocks, repository, expiry) and `recovery` (gates, scorecards) and copies nothing of them. `kind.Kind` is what a
new kind of store has to be, `dump.run_backup` takes a backup of any, `verify.verify` proves it; each other module is one kind.
"""
