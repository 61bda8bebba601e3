"""How good a model is: losses on held-out clips and their table, the Euler sampler, what is wrong with a clip."""
