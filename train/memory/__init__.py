"""What a layer keeps for its backward, where, and in which format."""
