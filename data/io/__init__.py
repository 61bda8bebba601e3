"""Files and bytes from wherever they lie: local, remote, locked, tried again."""
