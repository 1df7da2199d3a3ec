"""The whole mesh as users see it.

A package, unlike the other folders of tests, so that its fixtures of package scope end with its last test: a mesh that
ran on would keep dialling the collector in this process while later tests look for leaks.
"""
