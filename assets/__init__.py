"""What exists and what is proven, as Dagster assets. Thin: each function is a few lines over `ops_platform`."""
