"""What several tests share: small real models, shards and videos; processes, servers and faults; oracles."""

from pathlib import Path

HELPERS = Path(__file__).parent
"""Some helpers are scripts, which tests start as processes of their own."""
