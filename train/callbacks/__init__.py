"""What happens around a step: metrics, validation, checkpoints, stops."""
