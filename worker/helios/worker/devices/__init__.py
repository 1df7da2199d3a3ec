"""What a node can run models on: an inventory of devices, and what is measured of them.

Knows the supervisor's records and nothing else of it. NVML is touched in `nvml` only, and imported only where a driver
is.
"""
