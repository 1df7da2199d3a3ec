"""vLLM as a replica's engine: AsyncLLM, its engine process forked rather than spawned, and vLLM's own OpenAI code.

``compat`` is the only module that touches what vLLM does not promise to keep; it is pinned to one minor version.
"""
