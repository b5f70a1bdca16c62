"""Ahead-of-time checks without a GPU: compile the decode kernels for an architecture and read their machine code.

`python -m kvplan.kernels.aot usual|shipped|latent ARCH...` prints one JSON object a configuration: registers, spills,
asynchronous copies and their width, warp-instructions of the main loop per KB of KV. Triton's wheel carries ptxas,
cuobjdump and nvdisasm.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configs import Config, mla_config
from .decode_attention.shape import DecodeShape
from .device import GLUON
from .formats import FOUR_BIT_HEAD_DIMS, HEAD_DIMS, LATENT_ROW_BYTES, kv_format
from .mla_decode import FORMAT_CODES
from .mla_decode.kernel import attend_latent
from .unpack import BITS, PTX

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class DecodeCase:
    """One decode kernel: what is read, by which configuration, for which architecture."""

    arch: int
    shape: DecodeShape
    config: Config
    soft_cap: bool = False
    window: bool = False
    sinks: bool = False


def _kernel_and_signature(case: DecodeCase) -> tuple[object, dict, dict, dict]:
    fmt = case.shape.fmt
    kernel = case.shape.kernel(case.config)
    constants = case.shape.constants(
        case.config,
        soft_cap=case.soft_cap,
        window=case.window,
        sinks=case.sinks,
        batch=1 if case.shape.one_sequence else 32,
        unpack=PTX if case.arch >= 89 else BITS,
        exact_dot=False,
        dependent=GLUON and case.arch >= 90,
    )
    wide = {"bf16": ("*bf16", "*bf16"), "fp16": ("*fp16", "*fp16")}.get(fmt.name, ("*u8", "*u16"))
    floats = ("k_scale_ptr", "v_scale_ptr", "sink_ptr", "partial_ptr", "partial_lse_ptr")
    types = {"q_ptr": "*bf16", "k_ptr": wide[0], "v_ptr": wide[1], "out_ptr": "*bf16"} | dict.fromkeys(floats, "*fp32")
    types |= {
        "arrived_ptr": "*i32",
        "block_table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "scale_log2e": "fp32",
        "soft_cap": "fp32",
    }
    if fmt.name == "fp16":
        types["q_ptr"] = types["out_ptr"] = "*fp16"
    if case.config.whole_runs:
        types["v_ptr"] = "*u8"
    if fmt.element_bits == 4:
        packed = "*u32" if case.shape.head_dim == 64 else "*u64"
        types |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), packed if fmt.name == "int4" else "*u8")
        types |= {"k_ptr": "*u16", "global_ptr": "*fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    whole = [p for p in kernel.params if not p.do_not_specialize and signature[p.name] not in ("constexpr", "fp32")]
    return kernel, signature, constants, {(p.num,): [["tt.divisibility", 16]] for p in whole}


def compile_case(case: DecodeCase) -> object:
    """Triton's compiled kernel for `case`; needs no GPU."""
    return _compile(*_kernel_and_signature(case), case.arch, case.config)


def source_of(kernel: object) -> type:
    """Triton's class for the source of `kernel`, whichever language it is written in."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    return ASTSource


def _compile(kernel: object, signature: dict, constants: dict, aligned: dict, arch: int, config: Config) -> object:
    source = source_of(kernel)(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_latent(arch: int, kv_dtype: str, num_heads: int, config: Config) -> object:
    """Triton's compiled latent kernel with `num_heads` query heads a program; needs no GPU."""
    constants = {
        "HEAD_BLOCKS": 1,
        "HEADS": num_heads,
        "HP": num_heads,
        "ROW": LATENT_ROW_BYTES[kv_dtype] // 2,
        "PAGE": 64,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "FORMAT": FORMAT_CODES[kv_dtype],
        "BATCH": 32,
        "JOIN_STAGES": 2,
        "UNPACK": PTX if arch >= 89 else BITS,
        "EXACT_DOT": False,
    }
    types = {"q_ptr": "*bf16", "out_ptr": "*bf16", "row_ptr": "*bf16" if kv_dtype == "bf16" else "*u16"}
    types |= dict.fromkeys(("scale_ptr", "partial_ptr", "partial_lse_ptr"), "*fp32") | {"scale_log2e": "fp32"}
    types |= dict.fromkeys(("arrived_ptr", "block_table_ptr", "seq_lens_ptr"), "*i32")
    names = attend_latent.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    return _compile(attend_latent, signature, constants, aligned, arch, config)


def _tool(name: str, cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *flags, file.name], capture_output=True, text=True, check=True).stdout


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def main_loop(sass: str) -> list[str]:
    """Instructions of the innermost loop with the most matrix products."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction.group(1).strip())
    loops = []
    for at, instruction in enumerate(code):
        target = re.search(r"(\.L_x_\d+)", instruction) if _opcode(instruction).split(".")[0] == "BRA" else None
        if target and labels.get(target.group(1), at + 1) <= at:
            loops.append((labels[target.group(1)], at + 1))
    innermost = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    bodies = [code[a:b] for a, b in innermost] or [code]
    return max(bodies, key=lambda body: sum("MMA" in _opcode(i) for i in body))


def facts(case: DecodeCase) -> dict:
    """Machine-code facts of `case` as a plain dict (see the keys below)."""
    shape, config = case.shape, case.config
    heads = shape.heads_a_program(config)
    tile_bytes = heads * config.block_n * shape.head_dim * 2 * shape.fmt.element_bits // 8
    named = asdict(shape) | {"arch": case.arch, "kv_dtype": shape.fmt.name, "config": asdict(config)}
    return {**named, **_machine_code(compile_case(case), config.num_warps, tile_bytes)}


def latent_facts(arch: int, kv_dtype: str, num_heads: int) -> dict:
    """The same of the latent kernel."""
    config = mla_config(arch, 16 if kv_dtype == "bf16" else 8, num_heads)
    kernel = compile_latent(arch, kv_dtype, num_heads, config)
    code = _machine_code(kernel, config.num_warps, config.block_n * LATENT_ROW_BYTES[kv_dtype])
    return {"arch": arch, "kv_dtype": kv_dtype, "num_heads": num_heads, "config": asdict(config), **code}


def _machine_code(kernel: object, num_warps: int, tile_bytes: int) -> dict:
    cubin = kernel.asm["cubin"]
    usage = _tool("cuobjdump", cubin, "-res-usage")
    whole = _tool("nvdisasm", cubin, "-c")
    body = [_opcode(i) for i in main_loop(whole)]
    counts = Counter(body)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", whole)),
        "shared_bytes": kernel.metadata.shared,
        "async_copies": sorted({o for o in counts if o.startswith("LDGSTS")}),
        "matrix_products": sorted({o for o in counts if "MMA" in o}),
        "barriers_per_tile": sum(o.startswith("BAR") for o in body),
        "warp_instructions_per_kb": len(body) * num_warps * 1024 / tile_bytes,
        "opcodes": dict(Counter(o.split(".")[0] for o in body).most_common()),
    }


def _shape(
    kv_dtype: str, scales: str, head_dim: int, group_size: int, layout: str = "HND", block_size_tokens: int = 64
) -> DecodeShape:
    """8 KV heads."""
    return DecodeShape(kv_format(kv_dtype), scales, layout, block_size_tokens, 8, head_dim, group_size)


SHIPPED = (
    *(
        _shape(kv_dtype, scales, head_dim, group)
        for kv_dtype, scales, head_dims in (
            ("bf16", "none", HEAD_DIMS),
            ("fp8_e4m3", "tensor", HEAD_DIMS),
            ("fp8_e4m3", "token_head", HEAD_DIMS),
            ("int8", "token_head", HEAD_DIMS),
            ("int4", "block", FOUR_BIT_HEAD_DIMS),
            ("nvfp4", "block", FOUR_BIT_HEAD_DIMS),
        )
        for head_dim in head_dims
        for group in (8, 16)
    ),
    *(
        _shape(kv_dtype, "token_head_inline", head_dim, 8, layout)
        for kv_dtype in ("fp8_e4m3", "int8")
        for head_dim, layout in ((64, "NHD"), (128, "NHD"), (64, "HND"), (128, "HND"), (256, "HND"))
    ),
    *(
        _shape("int8", scales, head_dim, 8, block_size_tokens=block_size_tokens)
        for scales, head_dim in (("token_head", 80), ("token_head", 128), ("token_head_inline", 128))
        for block_size_tokens in (16, 32)
    ),
    *(
        replace(_shape(kv_dtype, scales, head_dim, 8), one_sequence=True)
        for kv_dtype, scales, head_dims in (
            ("bf16", "none", HEAD_DIMS),
            ("int8", "token_head", HEAD_DIMS),
            ("int4", "block", FOUR_BIT_HEAD_DIMS),
            ("nvfp4", "block", FOUR_BIT_HEAD_DIMS),
        )
        for head_dim in head_dims
    ),
)
"""What the configuration table is asked for: the dearest scales of each width, both group classes, every head_dim."""

USUAL = (
    _shape("bf16", "none", 128, 8),
    _shape("fp8_e4m3", "tensor", 128, 8),
    _shape("fp8_e4m3", "token_head", 128, 8),
    _shape("fp8_e4m3", "token_head_inline", 128, 8),
    _shape("fp8_e4m3", "tensor", 80, 8),
    _shape("fp8_e5m2", "token_head", 128, 8),
    _shape("int8", "token_head", 128, 8),
    _shape("int4", "block", 128, 8),
    _shape("fp8_e4m3", "token_head", 128, 8, "NHD"),
    _shape("fp8_e4m3", "token_head_inline", 128, 8, "NHD"),
    replace(_shape("bf16", "none", 128, 8), one_sequence=True),
    replace(_shape("fp8_e4m3", "token_head", 128, 8), one_sequence=True),
)
"""8 query heads a KV head: 16-bit, int4, and 8-bit with every kind of scale, in both layouts, rows of 80 bytes too, and
batches of one."""


def shipped_cases(arch: int) -> list[DecodeCase]:
    """Every entry of the configuration table on `arch`."""
    return [DecodeCase(arch, shape, config) for shape in SHIPPED for config in shape.configs(arch)]


def usual_cases(arch: int) -> list[DecodeCase]:
    """The usual shapes with their default configurations."""
    return [DecodeCase(arch, shape, shape.configs(arch)[0]) for shape in USUAL]


def main(arguments: list[str]) -> None:
    """Print facts: `usual|shipped|latent ARCH...`."""
    choose = {"usual": usual_cases, "shipped": shipped_cases}
    for arch in map(int, arguments[1:]):
        if arguments[0] == "latent":
            made = (latent_facts(arch, kv_dtype, 16) for kv_dtype in FORMAT_CODES)
        else:
            made = map(facts, choose[arguments[0]](arch))
        for one in made:
            print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
