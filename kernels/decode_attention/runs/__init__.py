"""Decode attention that copies 8-bit pages in whole runs; in Gluon, as of Triton 3.6."""

from .kernel import attend_runs

__all__ = ["attend_runs"]
