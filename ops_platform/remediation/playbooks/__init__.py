"""The remedies, by the system that they act on."""
