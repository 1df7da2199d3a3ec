"""Cordons: workers that nothing more is to be started on, kept here for all proxies, who watch."""
