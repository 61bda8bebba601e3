"""Several runs from one command: ``python -m train -m lora.rank=32,64 seed=0,1,2``.

expand    from the command line to the settings of each run, in Hydra's grammar
command   what -m does: makes the sweep's folder, or takes one up again
local     the runs on this machine, one after the other, each a process of its own
"""
