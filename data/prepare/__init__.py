"""From a folder or table of videos to shards: `python -m data.prepare`.

In the order in which a run passes them:

    run.py          the whole run: how the others work together
    sources.py      reads a list of videos (listed.py); row by row: tables, csv_table, parquet_table
    layouts.py      the lists of common collections; spans.py, packed.py: pieces of long videos, videos inside tables
    describing.py   captions for videos that have none
    selection.py    filters on columns, and ranking
    qualifying.py   filters on headers, and duplicates.py: videos that are there twice
    chosen.py       the videos that a folder is made of
    preview.py      a look at it before anything is encoded
    decoders.py     processes that decode while the device encodes; video.py: clips of a video, whose
                    cuts shots.py finds and clip_places.py keeps clips from; clip_rules.py: which are left out
    journal.py      how a killed run goes on
    underway.py     how a folder stands among ranks
    merge.py        the end: the manifest of what all ranks have done
    append.py       the same command on a finished folder: what differs, and what is added
"""
