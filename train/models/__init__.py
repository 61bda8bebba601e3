"""Models: a family's adapter, where the weights lie, how they are loaded, which positions they get.

The facts of a model (native size and length, strides, patch, shifts, mask rule, steps) are in its file of conf/model.
"""
