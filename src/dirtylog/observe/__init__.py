"""Consumers that look: rounds of a log, and pictures of them."""
