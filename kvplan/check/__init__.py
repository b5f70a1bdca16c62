"""Confront a plan with a server that runs: read what it reported, and reconcile it term by term."""
