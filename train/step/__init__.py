"""One training step: what its clips are trained with, its objective, the module, the optimizer, the moving average."""
