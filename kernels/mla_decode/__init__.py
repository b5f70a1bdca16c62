"""Paged split-KV decode for latent attention: `MlaPlan` prepares it, `MlaPlan.run` launches it on a layer."""

from .plan import FORMAT_CODES, MlaPlan

__all__ = ["FORMAT_CODES", "MlaPlan"]
