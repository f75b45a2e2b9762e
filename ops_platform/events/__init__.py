"""Events as they come in from Kafka and as our own go out: CloudEvents 1.0, read exactly once into what a caller stores with the cursor."""

from ops_platform.events.cloudevents import NotAnEventError, signal_of_event

__all__ = ["NotAnEventError", "signal_of_event"]
