"""Which attention a step runs, and over how many GPUs."""
