"""Training on several processes: launchers, sharding strategies, collectives and the watchdog."""
