"""AdminService: what operators do."""
