"""One module per system: opens its official client with timeouts, TLS and retries."""
