"""What a person may write: the typed schema, its composition from files and the command line, its checks.

sections.py    the keys of optim, lora, attention and all other sections: default, meaning, unit, bounds
schema.py      the keys of model and clip, and a run of all sections
"""
