"""What the steps of runbooks do, by system. Each module registers its own."""
