"""When: from the inventory, in each target's own zone."""
