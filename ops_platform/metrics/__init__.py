"""The platform seen from outside: Prometheus metrics of the ledger, the incidents, the promises and Dagster's schedules and sensors."""

from ops_platform.metrics.collect import METRICS, Metric
from ops_platform.metrics.serve import serve

__all__ = ["METRICS", "Metric", "serve"]
