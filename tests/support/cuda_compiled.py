"""What nvcc makes of the CUDA kernels, for GPUs that need not be there, and how much of a GPU they take.

python -m tests.support.cuda_compiled   prints a table, and writes budgets/cuda.json anew
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

CSRC = Path(__file__).parents[2] / "csrc"
BUDGET = Path(__file__).parents[1] / "budgets" / "cuda.json"
POINTWISE = ("pointwise/forward_step.cu", "pointwise/reverse_update.cu")
FUSED = ("mlp/forward.cu", "mlp/adjoint.cu", "mlp/exact.cu", "mlp/gradients.cu")
GPUS = (80, 90, 100, 120)
NVCC = shutil.which("nvcc")


def nvcc(source, gpu, kind, *options):
    """The compiler's messages, and what it wrote, as text where it is text."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [
            NVCC,
            "-std=c++17",
            "-O3",
            f"-{kind}",
            f"-arch=sm_{gpu}",
            "-I",
            CSRC,
            *options,
            CSRC / source,
            "-o",
            out,
        ]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout
        return done.stdout, out.read_text() if kind == "ptx" else None


def named(symbol):
    """A kernel's name as in the source, with its types: reverse_kernel<true, float, __half>."""
    demangled = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = re.search(r"\w+_kernel<(?:\([^)]*\)|[^>])*>", demangled)[0]
    return name.replace("(bool)1", "true").replace("(bool)0", "false").replace("(int)", "")


def resources(gpu, sources=POINTWISE + FUSED):
    """By kernel: registers a thread, and bytes a thread of local memory, where spills go."""
    found = {}
    for source in sources:
        messages, _ = nvcc(source, gpu, "cubin", "-Xptxas", "-v")
        for symbol, report in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers)", messages, re.S):
            stack, stores, loads = map(
                int, re.search(r"(\d+) bytes stack.* (\d+) bytes spill s.* (\d+) bytes", report).groups()
            )
            registers = int(re.search(r"Used (\d+) registers", report)[1])
            found[named(symbol)] = {"registers": registers, "local": stack + stores + loads}
    return found


def bodies(source, gpu):
    """The PTX of each kernel, by name."""
    _, ptx = nvcc(source, gpu, "ptx")
    return {named(part.split("(")[0].strip()): part for part in ptx.split(".entry ")[1:]}


def main():
    budget = {f"sm_{gpu}": resources(gpu) for gpu in GPUS}
    for name in budget["sm_90"]:
        print(f"{name:45}", *(f"{gpu} {of[name]['registers']:3} registers" for gpu, of in budget.items()), sep="  ")
    figures = {
        gpu: {name: used["registers"] if not used["local"] else used for name, used in of.items()}
        for gpu, of in budget.items()
    }
    BUDGET.write_text(json.dumps(figures, indent=1) + "\n")
    spilled = [f"{gpu} {name}" for gpu, of in budget.items() for name, used in of.items() if used["local"]]
    print(f"these spill registers: {', '.join(spilled) or 'none'}")


if __name__ == "__main__":
    main()
