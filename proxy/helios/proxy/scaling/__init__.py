"""How many replicas models should have. All pure."""
