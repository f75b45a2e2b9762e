"""The command line `ops`."""
