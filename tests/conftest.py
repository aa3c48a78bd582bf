import os

import hypothesis

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # references are exact in float32 on a CPU
os.environ.setdefault(
    "JAX_ENABLE_COMPILATION_CACHE", "0"
)  # the user's is none of a test's

# No deadline: the first example of a test compiles, and machines are shared.
hypothesis.settings.register_profile("continuous-lm", deadline=None, max_examples=40)
hypothesis.settings.load_profile("continuous-lm")
