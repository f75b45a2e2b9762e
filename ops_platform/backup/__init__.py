"""Base backups, the WAL archive, the repository, expiry. The face of the room: what others import stands in its modules.

`basebackup.run_backup` takes one, `engine.open_engine` reads what any engine wrote, `receiver.Receiver` keeps the WAL,
`archive.archive_status` says how it stands, `durable.wait_durable` waits until it holds something, `expiry` removes what nothing promises
any more, `opening` opens the repository in which all of it is kept.
"""
