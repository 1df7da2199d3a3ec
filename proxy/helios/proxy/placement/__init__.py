"""Where replicas go: which worker, which of its devices, and who gives way. All pure."""
