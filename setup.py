"""sim_jax: distil pretrained diffusion models into one- and few-step generators, in JAX."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="sim_jax",
    version="0.1.0",
    description="Score Implicit Matching, DMD2 and their family in JAX: diffusion models to one-step generators",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["sim_jax", "sim_jax.*"]),
    package_data={"sim_jax": ["assets/*", "assets/*/*"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "ml-collections>=1.0",
        "clu>=0.0.12",
        "tensorflow-datasets>=4.9.7",
        "array_record>=0.6",
        "grain>=0.2.10",
        "numpy>=1.26",
        "ml-dtypes>=0.4",
        "absl-py>=2",
        "pillow>=10",
        "safetensors>=0.4.5",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "tensorboardX>=2.6.2",
    ],
    extras_require={
        "tf": ["tensorflow-cpu>=2.17"],
        "text": ["transformers>=4.44", "torch>=2.2", "sentencepiece>=0.2"],  # sim_jax.data.embed_prompts with a T5; CLIP scores
        "convert": [],  # nothing more: checkpoints of PyTorch are read without it
        "test": ["pytest>=8", "pytest-xdist>=3.5", "scipy>=1.11", "scikit-learn>=1.4",
                 "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29", "pyyaml>=6"],
        "notebook": ["jupyterlab>=4"],
    },
)
