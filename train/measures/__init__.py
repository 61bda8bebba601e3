"""How good a model is: losses of clips, the table of results, the Euler sampler, what is wrong with a clip."""
