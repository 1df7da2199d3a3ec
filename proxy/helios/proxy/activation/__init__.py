"""From no replica to a ready one: the activation's state machine, placement and start estimates, all pure."""
