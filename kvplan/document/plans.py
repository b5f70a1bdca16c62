"""Everything planned for one report, before anything is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvplan.document.measured import Run, read_run
from kvplan.document.precisions import Format, formats_of
from kvplan.document.question import Question, make_question, with_lengths
from kvplan.document.surfaces import contexts_of
from kvplan.dtypes import AUTO, canonical_kv_dtype
from kvplan.errors import InputError, KvplanError, UnsupportedError
from kvplan.gpu import GpuSpec
from kvplan.latency.kv import given_calibration, is_latent
from kvplan.latency.latent import latent_heads
from kvplan.latency.lines import ItlLine
from kvplan.memory.cache_plan import CachePlan
from kvplan.memory.plan import SizePlan
from kvplan.memory.setup import Setup, cache_plan, set_up
from kvplan.search import size


@dataclass(frozen=True)
class Plans:
    """A question and its plans.

    Attributes:
        room_bytes: KV memory of one GPU; below 0 what is missing on it.
        formats: the KV formats compared, the deployment's own among them.
        run: what was measured on this GPU, when a run folder was given.

    """

    question: Question
    size: SizePlan
    setup: Setup
    cache: CachePlan
    room_bytes: int
    formats: tuple[Format, ...]
    run: Run | None

    @property
    def gpu(self) -> GpuSpec:
        """The GPU; a report always has one."""
        assert self.setup.gpu is not None
        return self.setup.gpu

    @property
    def chosen(self) -> Format:
        """The KV format of the deployment."""
        return next(fmt for fmt in self.formats if fmt.is_chosen)

    @property
    def line(self) -> ItlLine | None:
        """ITL over context of the deployment; None when nothing is predicted."""
        return self.chosen.line

    @property
    def served(self) -> int:
        """Users held at the report's context and let run at once, over all replicas."""
        return (self.size.answers.max_batch_at_context or 0) if self.room_bytes > 0 else 0

    @property
    def held(self) -> int:
        """Users whose KV is held at the report's context, over all replicas, run or not."""
        if self.setup.request.max_num_seqs is None:
            return self.served
        return self.cache.max_batch(self.room_bytes, self.setup.context_tokens) * self.setup.num_replicas


def make_plans(options: Mapping[str, Any]) -> Plans:
    """Plan everything a report needs.

    Raises:
        KvplanError: the question cannot be understood, the engine refuses the deployment, or a file cannot be read.

    """
    question, plan = _planned(make_question(options))
    setup = set_up(question.size)
    question = with_lengths(question, setup.context_tokens)
    if plan.memory.kv_cache_bytes is None or setup.gpu is None:
        raise InputError("the memory of this GPU is unknown", hint="add --gpu-memory 80GiB")
    if question.calibration is not None:  # an unusable file is an error, not a precision without times
        heads = latent_heads(setup.model, setup.request.tp_size, setup.request.dcp_size)
        given_calibration(question.calibration, setup.gpu.name, setup.engine.name, is_latent(setup.model), heads)
    run = None if question.measured is None else read_run(question.measured, setup.gpu.name)
    cache = cache_plan(setup)
    room = -plan.memory.excess_bytes or plan.memory.kv_cache_bytes
    formats = formats_of(question, setup, cache, room, contexts_of(setup))
    return Plans(question, plan, setup, cache, room, tuple(formats), run)


def _planned(question: Question) -> tuple[Question, SizePlan]:
    """The sizing plan; where the engine refuses the KV format, that of the model's default, and the question says so.

    Raises:
        KvplanError: the request cannot be planned with either.

    """
    try:
        return question, size(question.size)
    except UnsupportedError as error:
        asked = canonical_kv_dtype(question.size.kv_cache_dtype)
        fallback = replace(question.size, kv_cache_dtype=AUTO)
        try:
            plan = size(fallback)
        except KvplanError:
            raise error from None
        return replace(question, size=fallback, refused=asked, refusal=error.message), plan
