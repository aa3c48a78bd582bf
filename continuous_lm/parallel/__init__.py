"""Many devices: meshes, processes, and data parallelism by `jax.pmap`."""
