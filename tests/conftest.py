"""Settings every test runs under: 8 fake CPU devices and no silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["NPROC"] = "32"  # threads for the collectives of 8 devices; see forgejax/sharding/mesh.py
