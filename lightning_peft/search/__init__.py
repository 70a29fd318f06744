"""Searches over runs."""
