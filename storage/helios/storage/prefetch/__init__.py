"""Fetching ahead: what the registry expects is here before it is asked for, where that costs nobody anything."""
