"""The endpoint picker: Envoy's ext_authz and ext_proc in front of the core."""
