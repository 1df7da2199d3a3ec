"""Usage: what this proxy's requests were, told to the registry; and the registry's advice on what to keep warm."""
