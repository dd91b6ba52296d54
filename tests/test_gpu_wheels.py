"""tools/gpu_wheels.py: what is fetched, and how it is divided among folders."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from helpers.common import ROOT


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_wheels", ROOT / "tools" / "gpu_wheels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_folder_is_larger_than_it_may_be(tool: ModuleType, tmp_path: Path) -> None:
    wheels = [tmp_path / f"{size}-{number}.whl" for number, size in enumerate((10, 50, 30, 30, 60))]
    for wheel in wheels:
        wheel.write_bytes(bytes(int(wheel.name.partition("-")[0])))
    groups = tool.groups(wheels, 60)
    assert sorted(wheel for group in groups for wheel in group) == sorted(wheels)
    assert [sum(wheel.stat().st_size for wheel in group) for group in groups] == [60, 60, 60]
    with pytest.raises(SystemExit, match=r"60-4\.whl has .* more than --megabytes"):
        tool.groups(wheels, 59)


def test_what_the_gpu_machine_has_is_left_out(tool: ModuleType) -> None:
    required = tool.requirements(ROOT / "pyproject.toml")
    assert "transformers>=4.56" in required
    assert not [name for name in required if tool.PREINSTALLED.match(name)]
    preinstalled = ("torch", "triton", "nvidia-nccl-cu12", "cuda-bindings")
    assert all(tool.PREINSTALLED.match(name) for name in preinstalled)
    assert not any(tool.PREINSTALLED.match(name) for name in ("tokenizers", "torchvision-stub", "numpy"))
