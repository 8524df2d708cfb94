"""Learning what reuse costs from a generation that is made anyway."""
