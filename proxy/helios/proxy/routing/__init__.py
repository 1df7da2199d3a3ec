"""Filter, score, pick: pure policy over the replicas of one model revision."""
