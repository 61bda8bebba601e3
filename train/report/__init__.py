"""A run as one page, with its charts and pictures: ``python -m train.report``."""
