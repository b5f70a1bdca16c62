"""Command-line options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvplan.cli import complete

MODEL = "What to serve"
HARDWARE = "On what"
ENGINE = "How it is served"
LOAD = "Under load"
MEMORY = "Memory terms"
SHAPE = "A model from flags"
OUTPUT = "Output"


@dataclass(frozen=True)
class Declared:
    """An option of which some commands take one value and others a list.

    Attributes:
        flags: its spellings, the usual one first.
        about: its help, without the full stop.
        panel: the heading it is helped under.
        names: completes its values.

    """

    flags: tuple[str, ...]
    about: str
    panel: str
    names: Callable[[str], list[str]] | None = None

    def one(self, **settings: Any) -> Any:
        """The option for one value; ``settings`` of ``typer.Option`` win."""
        usual = {"help": f"{self.about}.", "autocompletion": self.names, "rich_help_panel": self.panel}
        return typer.Option(*self.flags, **(usual | settings))

    def many(self, **settings: Any) -> Any:
        """The option for values between commas."""
        return self.one(**({"help": f"{self.about}. A list sweeps."} | settings))


CONTEXT = Declared(("--ctx", "--context"), "Tokens of context a request; 32k is 32,768", MODEL)
BATCH = Declared(("--batch", "--batch-size", "--concurrency", "--users"), "Requests (users) at once", MODEL)
KV_CACHE_DTYPE = Declared(
    ("--kv-cache-dtype",),
    "auto, bf16, fp8, fp8_per_token_head, int8_per_token_head, int4_per_token_head, nvfp4 … (`kvplan dtypes`)",
    MODEL,
    complete.kv_dtypes,
)
GPU = Declared(("--gpu",), "GPU (`kvplan gpus`), or local", HARDWARE, complete.gpus)
TP = Declared(("--tp", "--tensor-parallel-size", "--tp-size"), "Tensor parallel ranks", HARDWARE)
PP = Declared(("--pp", "--pipeline-parallel-size", "--pp-size"), "Pipeline ranks", HARDWARE)
DP = Declared(
    ("--dp", "--data-parallel-size", "--dp-size"), "Replicas; on vLLM ranks that share a model's experts", HARDWARE
)
DCP = Declared(
    ("--dcp", "--decode-context-parallel-size", "--dcp-size"), "Decode context parallel ranks within TP", HARDWARE
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Name (70b), hub id, folder or config.json.",
        autocompletion=complete.models,
        rich_help_panel=MODEL,
    ),
]
Context = Annotated[str | None, CONTEXT.many(help=f"{CONTEXT.about}. A list or a range (1k..128k, doubling) sweeps.")]
OneContext = Annotated[str | None, CONTEXT.one()]
Batch = Annotated[str | None, BATCH.many()]
OneBatch = Annotated[int | None, BATCH.one()]
KvCacheDtype = Annotated[str, KV_CACHE_DTYPE.many()]
OneKvCacheDtype = Annotated[str, KV_CACHE_DTYPE.one()]
InputTokens = Annotated[
    str | None, typer.Option("--isl", "--input-tokens", help="Prompt tokens of a request.", rich_help_panel=LOAD)
]
OutputTokens = Annotated[
    str | None, typer.Option("--osl", "--output-tokens", help="Answer tokens of a request.", rich_help_panel=LOAD)
]
WeightDtype = Annotated[
    str | None,
    typer.Option(
        "--weight-dtype",
        help="bf16, fp8, fp8_block, int4, nvfp4, mxfp4; default from the checkpoint.",
        autocompletion=complete.weight_dtypes,
        rich_help_panel=MODEL,
    ),
]
Gpu = Annotated[str | None, GPU.many()]
OneGpu = Annotated[str | None, GPU.one()]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory", help="Memory of one GPU, e.g. 80GiB; replaces the profile's.", rich_help_panel=HARDWARE
    ),
]
TensorParallel = Annotated[str, TP.many()]
PipelineParallel = Annotated[str, PP.many()]
DataParallel = Annotated[str, DP.many()]
DecodeContextParallel = Annotated[str, DCP.many()]
OneTensorParallel = Annotated[int, TP.one()]
OnePipelineParallel = Annotated[int, PP.one()]
OneDataParallel = Annotated[int, DP.one()]
OneDecodeContextParallel = Annotated[int, DCP.one()]
ExpertParallel = Annotated[
    bool,
    typer.Option(
        "--ep", "--enable-expert-parallel", help="Deal experts whole to the TP × DP ranks.", rich_help_panel=HARDWARE
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        help="vllm (exact), sglang or tensorrt-llm (approximations), generic (arithmetic).",
        autocompletion=complete.engines,
        rich_help_panel=ENGINE,
    ),
]
EngineVersion = Annotated[
    str | None,
    typer.Option(
        "--engine-version", help="Version whose formulas and defaults to use, e.g. 0.19.", rich_help_panel=ENGINE
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        "--block-size",
        "--page-size",
        help="Tokens a block (a page) covers; default of the backend.",
        rich_help_panel=ENGINE,
    ),
]
MaxModelLen = Annotated[
    str | None,
    typer.Option("--max-model-len", help="Longest request; default --ctx, else the model's.", rich_help_panel=ENGINE),
]
MaxNumSeqs = Annotated[
    int | None, typer.Option("--max-num-seqs", help="Requests run at once, by each replica.", rich_help_panel=ENGINE)
]
MaxNumBatchedTokens = Annotated[
    str | None,
    typer.Option(
        "--max-num-batched-tokens",
        help="Tokens a step of each replica, SGLang's chunked prefill (which its ranks of attention share); windows of "
        "vLLM reserve as many in flight.",
        rich_help_panel=ENGINE,
    ),
]
SwaRatio = Annotated[
    float | None,
    typer.Option("--swa-full-tokens-ratio", help="SGLang: tokens of the pool of windows over tokens; default 0.8.",
                 rich_help_panel=ENGINE),
]  # fmt: skip
MambaRatio = Annotated[
    float | None,
    typer.Option("--mamba-full-memory-ratio", help="SGLang: bytes of states over bytes of tokens; default 0.9.",
                 rich_help_panel=ENGINE),
]  # fmt: skip
PrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Prefix caching; hybrids keep state copies for it.",
        rich_help_panel=ENGINE,
    ),
]
MemoryFraction = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-utilization",
        "--mem-fraction-static",
        "--free-gpu-memory-fraction",
        help="The engine's memory fraction: of total (vLLM), of what is free before weights, for weights and KV "
        "(SGLang), of free (TensorRT-LLM).",
        rich_help_panel=MEMORY,
    ),
]
KvCacheMemory = Annotated[
    str | None,
    typer.Option("--kv-cache-memory-bytes", help="KV bytes per GPU; skips the budget.", rich_help_panel=MEMORY),
]
WeightsMemory = Annotated[str | None, typer.Option("--weights-memory", help="Weights per GPU.", rich_help_panel=MEMORY)]
ActivationMemory = Annotated[
    str | None, typer.Option("--activation-memory", help="Activation peak per GPU.", rich_help_panel=MEMORY)
]
GraphMemory = Annotated[str | None, typer.Option("--graph-memory", help="CUDA graphs per GPU.", rich_help_panel=MEMORY)]
OverheadMemory = Annotated[
    str | None, typer.Option("--overhead-memory", help="Everything else per GPU.", rich_help_panel=MEMORY)
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Attention calibration (of `kvplan calibrate` or `measure`) to use for this GPU.",
        rich_help_panel=ENGINE,
    ),
]
Layers = Annotated[
    int | None, typer.Option("--layers", help="Layers, for a model without a config.", rich_help_panel=SHAPE)
]
KvHeads = Annotated[int | None, typer.Option("--kv-heads", help="KV heads.", rich_help_panel=SHAPE)]
HeadDim = Annotated[int | None, typer.Option("--head-dim", help="Width of a head.", rich_help_panel=SHAPE)]
Params = Annotated[str | None, typer.Option("--params", help="Parameters, e.g. 70e9 or 70B.", rich_help_panel=SHAPE)]
Window = Annotated[
    str | None, typer.Option("--window", help="Sliding window of every layer, in tokens.", rich_help_panel=SHAPE)
]
Cases = Annotated[
    Path | None,
    typer.Option(
        "--cases",
        help="JSONL of requests (- reads stdin); one result a line on stdout, or what is wrong with that case.",
        rich_help_panel=OUTPUT,
    ),
]
FromLog = Annotated[
    Path | None,
    typer.Option(
        "--from-log",
        help="Start from what a server reported in its start-up log (- reads stdin); other options say what changes.",
        rich_help_panel=MODEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
Explain = Annotated[
    bool, typer.Option("--explain", help="Print each formula with its numbers.", rich_help_panel=OUTPUT)
]
Check = Annotated[bool, typer.Option("--check", help="Exit 1 when it does not fit.", rich_help_panel=OUTPUT)]
