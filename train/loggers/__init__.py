"""Where metrics and the environment are written."""
