from pathlib import Path

from setuptools import find_packages, setup

CONFIG_FOLDERS = ("model_configs", "train_configs", "dataset_configs")

setup(
    name="fm9g",
    version="0.1.0",
    description="Pretrain and finetune the 9G language models: raw text in, a Hugging Face model out",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["fm9g", "fm9g.*"]),
    package_data={"fm9g": ["py.typed"], "fm9g.data": ["templates/*.jinja"], "fm9g.report": ["*.jinja"]},
    data_files=[(f"share/fm9g/{name}", [str(file) for file in Path(name).glob("*.*")]) for name in CONFIG_FOLDERS],
    entry_points={"console_scripts": ["fm9g = fm9g.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=4.56",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "numpy>=2",
        "orjson",
        "pysimdjson",
        "datasets",
        "pyarrow",
        "jinja2>=3.1.6",
        "h5py",
        "peft",
        "jsonschema",
        "tensorboardX",
        "tensorboard",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        # The first two are built against one CUDA and one torch; opendelta is installed with --no-deps.
        "bmtrain": ["bmtrain==1.0.1"],
        "flash-attn": ["flash-attn"],
        "opendelta": ["opendelta==0.3.2"],
        "quantization": ["bitsandbytes"],
        "tiktoken": ["tiktoken"],  # to read *.tiktoken files
        "tracking": ["wandb", "swanlab"],
        "dev": [
            "bitsandbytes",
            "tiktoken",
            "trl",  # published chat templates, to compare with
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "pre-commit",
        ],
    },
)
