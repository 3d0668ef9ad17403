"""The two commands: `edged`, the daemon's, and `edgectl`, everything that a person asks of it."""
