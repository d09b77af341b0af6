"""Compiles a Triton kernel for a GPU that need not be there, and prints what it needs: a process of its own, since in
Triton's interpreter there is no compiler.

    python compiling.py ARCHITECTURE KERNEL DTYPE HEAD_DIM[/that of v] [general] [strided]
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ringspan.kernels import triton_backward, triton_forward, triton_merge
from ringspan.kernels.triton_configs import Config, configs

KERNELS = {
    "forward": triton_forward.absorb_kernel,
    "dq": triton_backward.absorb_dq_kernel,
    "dkdv": triton_backward.absorb_dkdv_kernel,
    "merge": triton_merge.merge_kernel,
}
POINTERS = {"bf16": "*bf16", "f16": "*fp16", "f32": "*fp32"}
MATRICES = ("acc", "q", "k", "v", "do", "dq", "dk", "dv", "out")  # the rest has one axis less
GIVEN = ("q", "k", "v", "do", "out")  # of the inputs' dtype
ALIGNED = [["tt.divisibility", 16]]


def source(kernel, dtype: str, constants: dict, contiguous: bool) -> ASTSource:
    """Typed as a launch types it, with tensors aligned to 16 elements, as nearly all are."""
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name.endswith("_strides"):
            axes = 4 if name.removesuffix("_strides") in MATRICES else 3
            signature[name] = ("i32",) * (axes - 1) + ("constexpr" if contiguous else "i32",)
            if contiguous:
                constexprs[place, axes - 1] = 1
            attributes |= {(place, axis): ALIGNED for axis in range(axes - 1) if contiguous}
        elif name.isupper():
            signature[name] = "constexpr"
            constexprs[(place,)] = constants[name]
        elif name in ("factor", "scale"):
            signature[name] = "fp32"
        elif name in ("lo", "hi", "flags", "ranges"):
            signature[name] = "*i32"
        elif name in (*MATRICES, "row_max", "row_sum", "lse", "delta"):
            signature[name] = POINTERS[dtype] if name in GIVEN else "*fp32"
            attributes[(place,)] = ALIGNED
        else:
            signature[name] = "i32"
    return ASTSource(kernel, signature, constexprs, attributes)


def compile_for(
    architecture: int,
    name: str,
    dtype: str,
    head_dim: int,
    value_dim: int,
    band: bool = True,
    contiguous: bool = True,
    flagged: bool = False,
):
    dims, value_dims = (max(16, triton.next_power_of_2(dim)) for dim in (head_dim, value_dim))
    capability = divmod(architecture, 10)
    if name == "merge":
        dims = triton.next_power_of_2(head_dim)
        config = Config(triton_merge._ELEMENTS // dims, 0, 4, 1)  # Triton's own number of warps
    else:
        config = getattr(configs(capability, max(dims, value_dims), 4 if dtype == "f32" else 2), name)
    constants = {"HEAD_DIM": head_dim, "DIMS": dims, "VALUE_DIM": value_dim, "VALUE_DIMS": value_dims}
    constants |= {"ROWS": config.rows, "KEYS": config.keys, "STAGES": config.stages}
    constants |= {"BAND": band, "FLIPPED": False, "FLAGGED": flagged}
    return config, triton.compile(
        source(KERNELS[name], dtype, constants, contiguous),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": config.warps, "enable_fp_fusion": True},
    )


def disassembled(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """(instructions, where the labels are)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    return instructions, labels


def loops(cubin: bytes) -> list[dict[str, int]]:
    """The loops with products in them, in order: over whole blocks, over blocks with hidden pairs, then the careful."""
    instructions, labels = disassembled(cubin)
    found = []
    for place, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA.*(\.L_x_\d+)", instruction)
        if jump and labels[jump[1]] <= place:
            body = instructions[labels[jump[1]] : place + 1]
            tensor = sum(bool(re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)", x)) for x in body)
            if tensor or sum("FFMA" in x for x in body) > 250:
                spills = sum(bool(re.search(r"\b(LDL|STL)", x)) for x in body)
                waits = sum("WARPGROUP.DEPBAR" in x for x in body)
                found.append({"instructions": len(body), "tensor": tensor, "spills": spills, "waits": waits})
    return found


if __name__ == "__main__":
    architecture, name, dtype, dims, *options = sys.argv[1:]
    head_dim, value_dim = (int(dims.split("/")[i]) for i in (0, -1))
    how = "general" not in options, "strided" not in options
    config, compiled = compile_for(int(architecture), name, dtype, head_dim, value_dim, *how)
    needed = {
        "config": config,
        "warps": config.warps,
        "shared_bytes": compiled.metadata.shared,
        "loops": loops(compiled.asm["cubin"]),
    }
    print(json.dumps(needed))
