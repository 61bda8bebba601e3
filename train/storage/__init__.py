"""The run's folder: settings, state, checkpoints."""
