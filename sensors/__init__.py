"""What is noticed: new targets, WAL that lags, runs that failed."""
