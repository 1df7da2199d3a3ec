"""API keys: made, listed, revoked, and told to the proxies that check requests by them."""
