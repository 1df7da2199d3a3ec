"""The express lane: models that Envoy routes by itself, without asking the picker. Pure: no I/O, no clock."""
