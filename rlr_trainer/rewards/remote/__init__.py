"""Rewards over HTTP: a client and a server."""
