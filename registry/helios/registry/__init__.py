"""The registry: the truth about models.

It owns models, their immutable revisions, aliases and policies, and the blob store that holds the bytes of every
revision. It reads sources (directories of safetensors, GGUF files, the embedded model), refuses what it can't prove
whole, and streams changes to the proxies. Invariants: a revision never changes; a row names only blobs that are
complete on disk; a failed ingest leaves nothing behind.

The process never imports torch or transformers: conversion runs in a process of its own. Others import ``client`` only.
"""
