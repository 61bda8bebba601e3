"""Models: a family's adapter, where the weights lie, how they are loaded, which positions they get."""
