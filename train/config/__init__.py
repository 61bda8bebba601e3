"""What a person may write: the typed schema, its composition from files and the command line, its checks."""
