"""`moma doctor`: what this machine has, and what to install for what."""

import os
import platform
import shutil
from importlib import metadata
from typing import Any

import typer
from packaging.requirements import Requirement

from moma.cli.arguments import App, AsJson
from moma.cli.output import print_result
from moma.study.tables import Table

app = App()

# What the extras are for.
_EXTRAS = {
    "demo": "drawings and dictionary of `moma demo`, SVG files",
    "serve": "`moma serve`",
    "s3": "data on S3-compatible storage",
    "ray": "data on many machines, replicas of a server",
    "clean": "cleaning by languages, near duplicates and perceptual hashes",
    "lm-eval": "the lm-evaluation-harness",
    "fid": "`moma evaluate --suite fid`",
    "float8": "products in float8 on a GPU",
    "docs": "`make docs`",
    "dev": "`make test`",
}


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check versions, GPUs and packages. The exit code is 1 if something needed is missing."""
    found = examine()
    print_result(found, as_json, _tables(found), _advice(found))
    if found["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Look at this machine.

    Returns:
        `machine`, `packages`: the version of each package that moma needs, null if it is not
        installed; `gpus`: name and memory in bytes; `extras`: by name, the packages that are
        `missing`, their purpose, and the command that installs it; `problems`: what must be
        repaired, and how.
    """
    requirements = [Requirement(text) for text in metadata.requires("moma") or ()]
    needed = [each for each in requirements if each.marker is None or each.marker.evaluate()]
    problems = [
        f"{each} is needed, {_version(each.name) or 'nothing'} is installed: "
        f"pip install '{each.name}{each.specifier}'"
        for each in needed
        if not _is_met(each)
    ]
    gpus: list[dict[str, Any]] = []
    if _version("torch"):
        gpus, gpu_problems = _gpus()
        problems += gpu_problems
        problems += [] if gpus else _compiler_problems()
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        problems.append(
            "torch.compile needs a C++ compiler: install g++ (on Debian and Ubuntu: apt install "
            "g++), or train with pretrain.compile=false"
        )
    return {
        "machine": _machine(),
        "packages": {each.name: _version(each.name) for each in needed},
        "gpus": gpus,
        "extras": _extras(requirements),
        "problems": problems,
    }


def _machine() -> dict[str, Any]:
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "moma": _version("moma"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": pages * page_size,
        "free_disk": shutil.disk_usage(".").free,
    }


def _compiler_problems() -> list[str]:
    import torch

    from moma.runtime.world import compiles_right_for_cpus

    if compiles_right_for_cpus():
        return []
    return [
        f"layers compiled for a CPU by PyTorch {torch.__version__} may compute wrong gradients, so "
        "training does not compile them: pip install 'torch>=2.13'"
    ]


def _gpus() -> tuple[list[dict[str, Any]], list[str]]:
    """The GPUs that PyTorch can use, and why it cannot use one."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return [], []
        build = torch.version.cuda and f"for CUDA {torch.version.cuda}"
        return [], [
            f"PyTorch {torch.__version__} ({build or 'a build for CPUs'}) finds no GPU, although "
            "nvidia-smi is there: see whether nvidia-smi lists one, and install a build of PyTorch "
            "for its driver (https://pytorch.org/get-started/locally)"
        ]
    found, problems = [], []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"name": properties.name, "memory": properties.total_memory})
        try:
            torch.ones(16, 16, device=f"cuda:{index}").matmul(torch.ones(16, 16).cuda(index)).sum()
            torch.cuda.synchronize(index)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            problems.append(
                f"GPU {index}, {properties.name}: cannot multiply matrices ({reason}); install a "
                "build of PyTorch for it (https://pytorch.org/get-started/locally)"
            )
    return found, problems


def _extras(requirements: list[Requirement]) -> dict[str, dict[str, Any]]:
    """Packages that are missing of each extra."""
    names = metadata.metadata("moma").get_all("Provides-Extra") or []
    found = {}
    for name in names:
        own = [
            each
            for each in requirements
            if each.marker is not None
            and not each.marker.evaluate()
            and each.marker.evaluate({"extra": name})
        ]
        found[name] = {
            "missing": [each.name for each in own if not _is_met(each)],
            "purpose": _EXTRAS.get(name, ""),
            "install": f"pip install 'moma[{name}]'",
        }
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _tables(found: dict[str, Any]) -> list[Table]:
    """Machine, packages and extras."""
    machine = dict(found["machine"])
    for key in ("memory", "free_disk"):
        machine[key] = _gigabytes(machine[key])
    gpus = [f"{gpu['name']}, {_gigabytes(gpu['memory'])}" for gpu in found["gpus"]]
    rows = [*machine.items(), ("GPU", "\n".join(gpus) or "none: everything runs on the CPU")]
    extras = [
        (name, ", ".join(extra["missing"]) or "nothing", extra["purpose"])
        for name, extra in found["extras"].items()
    ]
    return [
        Table("Machine", "", (), rows),
        Table("Packages", "", (), [*found["packages"].items()]),
        Table("Extras, which some tasks need", "", ("extra", "missing", "for"), extras),
    ]


def _advice(found: dict[str, Any]) -> list[str]:
    missing = [extra["install"] for extra in found["extras"].values() if extra["missing"]]
    lines = [f"to install an extra: {missing[0]}"] if missing else []
    problems = [f"problem: {each}" for each in found["problems"]]
    return [*lines, *(problems or ["all that moma needs is there"])]


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
