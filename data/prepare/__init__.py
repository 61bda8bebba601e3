"""From a folder or table of videos to shards: `python -m data.prepare`.

Open `data.prepare.sources` for lists (`tables`, `csv_table` and `parquet_table` for reading them row by row, `layouts`
for those of common collections, `spans` for pieces of long videos, `packed` for videos inside tables),
`data.prepare.selection` for filters on columns and ranking, `data.prepare.duplicates` for videos that are there twice,
`data.prepare.video` for decoding, `data.prepare.shots` for cuts, `data.prepare.clip_rules` for filters on pixels,
`data.prepare.chosen` for the videos that a folder is made of, `data.prepare.preview` for a look at it before anything
is encoded, `data.prepare.decoders` for the processes that decode while the device encodes, `data.prepare.journal` for
how a killed run goes on, `data.prepare.finished` for the same command on a finished folder, and `data.prepare.run` for
how they work together.
"""
