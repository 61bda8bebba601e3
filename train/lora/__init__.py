"""LoRAs: their layers in a model, their files in every format, their names and scales.

layers.py          the LoRA in a model: injected, read out, put back
reading.py         a file of ours or of another tool as tensors; keys.py: what tools put before and behind a layer's
                   name
names.py           a layer's name in ComfyUI's files and in the original checkpoint, whose names are in
                   name_tables.py
layers_by_name.py  what of a model a file may change
scaling.py         alpha / rank, where it stands beside the tensors
header.py          how a LoRA was trained, in the header of its file
masks.py           the masks that it was trained under, in a file beside it
file_checks.py     whether files fit the model, and whose expert they are; file_lists.py: files in one word
initial.py         the LoRA that training starts from
"""
