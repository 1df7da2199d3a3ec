"""The endpoint picker: Envoy's ext_proc protocol in front of the core."""
