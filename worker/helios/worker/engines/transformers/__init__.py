"""Any causal language model of Hugging Face's transformers, decoded one request at a time in a thread.

A reference: stock model code, stock logits processors, nothing fused, nothing batched. It runs what vLLM does not know,
and tests compare vLLM's answers with its own. It is not fast, and does not try to be.
"""
