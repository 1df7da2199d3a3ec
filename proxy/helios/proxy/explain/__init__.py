"""Where a request's time went and why: what was noted when it happened, laid out when somebody asks."""
