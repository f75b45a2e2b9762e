"""Operations platform: backups that prove themselves, safe changes, one tamper-evident record."""

__version__ = "0.1.0"
