"""From no replica to a ready one: the activation's state machine and start estimates, all pure."""
