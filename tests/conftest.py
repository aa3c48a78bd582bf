"""Settings of all tests."""

import gc
import os

import hypothesis

# References are exact in float32 on a CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests must not read or fill the user's compilation cache.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")

# No deadline: the first example of a test compiles, and machines are shared.
hypothesis.settings.register_profile("continuous-lm", deadline=None, max_examples=40)
hypothesis.settings.load_profile("continuous-lm")


def pytest_collection_finish():
    """Exempt the imported modules from garbage collection, which saves a fifth of all CPU time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
