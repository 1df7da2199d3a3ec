"""ModelService: what can be asked for, and where each model stands."""
