"""Rewards that are networks."""
