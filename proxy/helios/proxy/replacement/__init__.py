"""Another replica for an answer whose own broke off, or drains: what the relay asks this proxy for."""
