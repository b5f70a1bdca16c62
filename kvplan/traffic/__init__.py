"""What one decode step moves and computes on one GPU: weights, KV, activations, collectives.

Coefficients are worked out once for a (model, weight format, deployment, KV format); bytes and FLOPs at a batch and a
context are then arithmetic on numbers or numpy arrays of any one shape. Stored and read bytes are different quantities:
a sliding window stores whole blocks and reads its window, a sparse layer stores the context and reads its top k, a
replicated KV head is stored and read on every rank that needs it.
"""

from kvplan.traffic.build import make_traffic
from kvplan.traffic.precision import precision_class, weight_dtypes
from kvplan.traffic.terms import Floats, KvRead, Number, Traffic, WeightPart, touched_share

__all__ = [
    "Floats",
    "KvRead",
    "Number",
    "Traffic",
    "WeightPart",
    "make_traffic",
    "precision_class",
    "touched_share",
    "weight_dtypes",
]
