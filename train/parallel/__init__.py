"""Many processes: Lightning's strategies, ZeRO's parts, control messages, child processes."""
