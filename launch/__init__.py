"""Starting runs: the plan of memory and time, on this machine or a SLURM cluster, and looking after them."""
