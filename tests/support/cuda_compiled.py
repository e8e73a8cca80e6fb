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
POINTWISE = ("pointwise/forward_step.cu", "pointwise/reverse_update.cu", "pointwise/storing.cu")
FUSED = ("mlp/forward.cu", "mlp/adjoint.cu", "mlp/exact.cu", "mlp/gradients.cu")
GPUS = (80, 90, 100, 120)
NVCC = shutil.which("nvcc")


def compile_source(source, gpu, folder):
    """Compile to machine code in a folder, with the compiler's messages in messages.txt and the PTX in kernels.ptx."""
    command = (
        *(NVCC, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{gpu}", "-I", CSRC, "-Xptxas", "-v"),
        *("--keep", "--keep-dir", folder, CSRC / source, "-o", folder / "kernels.cubin"),
    )
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    (folder / "messages.txt").write_text(done.stdout)
    (folder / Path(source).with_suffix(".ptx").name).rename(folder / "kernels.ptx")


def kernel_names(symbols):
    """By symbol, a kernel's name as in the source, with its types: reverse_kernel<true, float, __half>."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = [re.search(r"\w+_kernel(?:<(?:\([^)]*\)|[^>])*>)?", line)[0] for line in done.stdout.splitlines()]
    plain = [name.replace("(bool)1", "true").replace("(bool)0", "false").replace("(int)", "") for name in names]
    return dict(zip(symbols, plain, strict=True))


def resources(folder):
    """By kernel: registers a thread, and bytes a thread of local memory, where spills go."""
    messages = (folder / "messages.txt").read_text()
    reports = dict(re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers)", messages, re.S))
    names = kernel_names(list(reports))
    found = {}
    for symbol, report in reports.items():
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack.* (\d+) bytes spill s.* (\d+) bytes", report).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        found[names[symbol]] = {"registers": registers, "local": stack + stores + loads}
    return found


def bodies(folder):
    """The PTX of each kernel, by name."""
    parts = (folder / "kernels.ptx").read_text().split(".entry ")[1:]
    symbols = [part.split("(")[0].strip() for part in parts]
    names = kernel_names(symbols)
    return {names[symbol]: part for symbol, part in zip(symbols, parts, strict=True)}


def resources_on(gpu):
    """Those of all sources."""
    found = {}
    for source in POINTWISE + FUSED:
        with TemporaryDirectory() as folder:
            compile_source(source, gpu, Path(folder))
            found |= resources(Path(folder))
    return found


def main():
    budget = {f"sm_{gpu}": resources_on(gpu) for gpu in GPUS}
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
