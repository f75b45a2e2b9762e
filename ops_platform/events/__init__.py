"""Events from Kafka, read exactly once into what is stored with the cursor, and our own on their way out: CloudEvents 1.0.

Its faces are `reader` (a tick, from a cursor to signals), `publisher` (the ledger's outbox), `reset` (the cursor where Dagster keeps it), `cursor`
and `cloudevents`.
"""

from ops_platform.events.cloudevents import NotAnEventError, signal_of_event

__all__ = ["NotAnEventError", "signal_of_event"]
