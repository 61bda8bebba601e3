"""Hydra YAML files: runs beside this file, groups in the folders."""
