"""What a block keeps for its backward, where, and in which format."""
