"""Low precision: the linear layers of the blocks in 8 or 4 bits, undone exactly."""
