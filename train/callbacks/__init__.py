"""What happens around a step: metrics, validation, checkpoints, stops, and how ranks part at the end."""
