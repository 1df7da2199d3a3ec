"""An engine without weights, with an engine's manners: batches, KV blocks, pre-emption, and failures from a seed.

For tests of everything around an engine, and for users' load tests: it starts at once, its answers are known, and its
times are what its options say. It says nothing of any real engine's speed.
"""
