"""Base backups, the WAL archive, the repository, expiry. The face of the room: what others import stands here."""
