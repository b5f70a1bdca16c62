"""Which ranks hold what: attention tensor and data parallel ranks, expert ranks, pipeline stages.

Attention and experts may be split differently on the same GPUs: DeepSeek-style serving runs attention data parallel and
spreads the experts over all ranks. A ``Deployment`` is one replica of the model; replicas share nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

NVLINK_NODE_GPUS = 8


@dataclass(frozen=True, slots=True)
class Deployment:
    """One replica of a model over its GPUs.

    Attributes:
        attention_tp_size: ranks that share one request's attention heads.
        attention_dp_size: groups of them, each with its own requests and KV cache.
        expert_parallel_size: ranks the experts are dealt to whole; 1 splits every expert like a column.
        pp_size: pipeline stages.
        num_replicas: copies of all this that share nothing but the load.
        notes: what was read into the request.

    """

    attention_tp_size: int
    attention_dp_size: int = 1
    expert_parallel_size: int = 1
    pp_size: int = 1
    num_replicas: int = 1
    notes: tuple[str, ...] = ()

    @property
    def tp_group_size(self) -> int:
        """GPUs of one pipeline stage of one replica: what dense weights and experts are split over."""
        return self.attention_tp_size * self.attention_dp_size

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.tp_group_size * self.pp_size * self.num_replicas

    @property
    def is_beyond_node(self) -> bool:
        """Whether one stage spans more GPUs than an 8-GPU node."""
        return self.tp_group_size > NVLINK_NODE_GPUS

    def describe(self) -> str:
        """``TP 4``, ``attention TP 1 × DP 8, EP 8``."""
        parts = [f"TP {self.attention_tp_size}"]
        if self.attention_dp_size > 1:
            parts = [f"attention TP {self.attention_tp_size} × DP {self.attention_dp_size}"]
        if self.expert_parallel_size > 1:
            parts.append(f"EP {self.expert_parallel_size}")
        if self.pp_size > 1:
            parts.append(f"PP {self.pp_size}")
        if self.num_replicas > 1:
            parts.append(f"{self.num_replicas} replicas")
        return ", ".join(parts)


def resolve_deployment(
    *,
    is_moe: bool,
    tp_size: int = 1,
    pp_size: int = 1,
    dp_size: int = 1,
    ep: bool = False,
    attention_dp_size: int | None = None,
    moe_tp_size: int | None = None,
    moe_ep_size: int | None = None,
    experts_span_dp: bool = False,
) -> Deployment:
    """The deployment that sizes as engines and public benchmark tables write them describe.

    ``dp_size`` makes replicas, except on a model with experts where these are shared over all ranks: with ``ep``, or on
    an engine that always does (``experts_span_dp``). There it is attention data parallelism. Tables often write one TP
    size for attention and experts: equal ``moe_tp_size`` and ``moe_ep_size`` above 1 name the number of GPUs, each with
    1/n of the experts; a TP wider than a node with the same ``moe_tp_size`` is attention data parallel with the experts
    spread.
    """
    moe_tp, moe_ep = moe_tp_size or 1, moe_ep_size or 1
    attention_dp = attention_dp_size or 1
    replicas = dp_size
    if attention_dp == 1 and dp_size > 1 and is_moe and (ep or experts_span_dp):
        return Deployment(tp_size, dp_size, tp_size * dp_size if ep else 1, pp_size)
    if attention_dp > 1:
        if moe_tp == moe_ep and moe_tp > 1:
            gpus = moe_tp
        else:
            gpus = tp_size if tp_size == attention_dp else tp_size * attention_dp
        attention_dp = min(attention_dp, gpus)
        spread = gpus if moe_ep > 1 or ep else 1
        return Deployment(max(1, gpus // attention_dp), attention_dp, spread, pp_size, replicas)
    if moe_tp == moe_ep and moe_tp > 1:
        note = f"moe_tp_size = moe_ep_size = {moe_tp}: taken as {moe_tp} GPUs with TP {moe_tp} and EP {moe_tp}"
        return Deployment(moe_tp, 1, moe_tp, pp_size, replicas, (note,) if moe_tp != tp_size else ())
    if is_moe and tp_size > NVLINK_NODE_GPUS and moe_tp == tp_size:
        note = f"TP {tp_size} with the experts over as many ranks: taken as attention DP {tp_size}, EP {tp_size}"
        return Deployment(1, tp_size, tp_size, pp_size, replicas, (note,))
    spread = (tp_size if ep else moe_ep) if is_moe else 1
    return Deployment(tp_size, 1, min(spread, tp_size), pp_size, replicas)
