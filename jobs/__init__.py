"""What is run: by a schedule, a sensor, a person, or `dagster job execute` in CI."""
