"""Adapters from inference engines to the replica's ``Engine`` protocol, one package an engine.

Heavy libraries (torch, vLLM) are imported here and nowhere else in the worker.
"""
