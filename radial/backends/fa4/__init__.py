"""flash-attn-4 on Hopper: the backend, the kernels derived from the library's, the order of their tiles."""
