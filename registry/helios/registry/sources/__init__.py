"""Where models come from. A source turns into a list of files that were checked; the ingester stores them.

Adding one means a class that keeps the promises of ``source.Source`` and a line in ``resolve``.
"""
