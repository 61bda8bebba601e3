"""From a folder or table of videos to shards: `python -m data.prepare`.

Open `data.prepare.sources` for lists and ranking, `data.prepare.conditions` for filters, `data.prepare.video` for
decoding, `data.prepare.plan` for what a folder is going to hold, `data.prepare.decoders` for the processes that decode
while the device encodes, `data.prepare.journal` for how a killed run goes on, `data.prepare.finished` for the same
command on a finished folder, and `data.prepare.run` for how they work together.
"""
