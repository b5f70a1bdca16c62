"""How requests and benchmark labels become ranks."""

from __future__ import annotations

import pytest

from kvplan.deployment import Deployment, resolve_deployment


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"tp_size": 4}, Deployment(4)),
        ({"tp_size": 2, "dp_size": 3}, Deployment(2, num_replicas=3)),
        # vLLM: --data-parallel-size 8 --enable-expert-parallel on a model with experts: attention DP, EP over all
        ({"tp_size": 1, "dp_size": 8, "ep": True, "is_moe": True}, Deployment(1, 8, 8)),
        # without the second flag vLLM splits the experts like columns over all ranks; other engines have replicas
        ({"tp_size": 2, "dp_size": 4, "is_moe": True, "experts_span_dp": True}, Deployment(2, 4)),
        ({"tp_size": 2, "dp_size": 4, "is_moe": True}, Deployment(2, num_replicas=4)),
        ({"tp_size": 2, "dp_size": 4, "experts_span_dp": True}, Deployment(2, num_replicas=4)),
        # the same flags on a dense model are replicas
        ({"tp_size": 1, "dp_size": 8, "ep": True}, Deployment(1, num_replicas=8)),
        ({"tp_size": 8, "ep": True, "is_moe": True}, Deployment(8, 1, 8)),
        (
            {"tp_size": 1, "attention_dp_size": 8, "moe_tp_size": 1, "moe_ep_size": 8, "is_moe": True},
            Deployment(1, 8, 8),
        ),
        (
            {"tp_size": 4, "attention_dp_size": 4, "moe_tp_size": 1, "moe_ep_size": 4, "is_moe": True},
            Deployment(1, 4, 4),
        ),
        ({"tp_size": 4, "pp_size": 2}, Deployment(4, pp_size=2)),
    ],
)
def test_labels_become_ranks(labels: dict[str, int], expected: Deployment) -> None:
    assert resolve_deployment(**{"is_moe": False, **labels}) == expected  # type: ignore[arg-type]


def test_equal_moe_sizes_name_the_gpus_and_the_note_says_so() -> None:
    found = resolve_deployment(is_moe=True, tp_size=64, moe_tp_size=8, moe_ep_size=8)
    assert (found.num_gpus, found.attention_tp_size, found.expert_parallel_size) == (8, 8, 8)
    assert "taken as 8 GPUs" in found.notes[0]


def test_gpus_count_stages_and_replicas() -> None:
    assert Deployment(4, 2, 8, pp_size=2, num_replicas=3).num_gpus == 4 * 2 * 2 * 3
