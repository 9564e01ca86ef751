"""Samplers as Gaussian transitions."""
