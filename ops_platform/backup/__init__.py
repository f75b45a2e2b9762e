"""Base backups, the WAL archive, the repository, expiry. The face of the room: what others import stands in its modules.

`basebackup.run_backup` takes one, `engine.open_engine` reads what any engine wrote, `receiver.Receiver` keeps the WAL,
`archive.archive_status` says how it stands, `expiry` removes what nothing promises any more.
"""
