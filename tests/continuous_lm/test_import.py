"""What `import continuous_lm` brings along."""

import subprocess
import sys

from tests.fixtures.programs import ENVIRONMENT

LATE = "optax tokenizers grain orbax matplotlib scipy torch transformers faiss".split()
LATE += ["huggingface_hub"]


def test_heavy_packages_wait_until_they_are_used():
    program = (
        f"import sys, jax, flax; before = set(sys.modules); import continuous_lm;"
        f" print(*({set(LATE)} & (set(sys.modules) - before)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == []
