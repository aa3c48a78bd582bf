"""What every program shares: its folder, its devices, how errors end, what a run records.

With several processes all of them run the whole program, and process 0 alone writes: the folder of
results, to which the others look when a run goes on, must be one that all of them can read.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from jax.sharding import Mesh

import continuous_lm as clm
from continuous_lm.errors import InputError
from continuous_lm.io.atomic_files import check_writable
from continuous_lm.parallel import processes
from continuous_lm.parallel.mesh import make_mesh

_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    None,
    "Folder for the results.  [default: results/ and the program's name]",
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder in which JAX keeps what it has compiled for the next run, or none."
    "  [default: JAX_COMPILATION_CACHE_DIR, or continuous_lm/jax in the user's cache folder]",
)
_MESH = flags.DEFINE_string(
    "mesh",
    None,
    "How many devices share points or rows, and the model: data=2,model=4."
    "  [default: one device; all on data, with several processes]",
)
_PMAP = flags.DEFINE_bool(
    "pmap", False, "Spread points or rows over all devices by jax.pmap."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, of several that run the program together; that port and the next must"
    " be free. auto: as Slurm, Open MPI or a TPU slice say.  [default: JAX_COORDINATOR_ADDRESS]",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "How many they are.  [default: JAX_NUM_PROCESSES]",
    lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    None,
    "The number of this one, from 0.  [default: JAX_PROCESS_ID]",
    lower_bound=0,
)
_STARTUP_TIMEOUT = flags.DEFINE_integer(
    "startup_timeout", 300, "Seconds until all processes must have come.", lower_bound=1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds without a sign of life that end a run.",
    lower_bound=1,
)


def run(
    main: Callable[[], None],
    *,
    supports_mesh: bool = False,
    supports_pmap: bool = False,
) -> None:
    """Runs `main` as an absl program; an `InputError` ends it with one line and exit status 1.

    Args:
      main: the program.
      supports_mesh: whether it places what it computes on `mesh()`, and so runs in several
        processes.
      supports_pmap: whether it does as `uses_pmap()` says.
    """

    def run_and_report_errors(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(
                logging.WARNING
            )  # at absl's INFO libraries are chatty
        try:
            if len(argv) > 1:
                raise InputError(
                    f"{argv[1]!r} is not a flag; flags begin with --, see --help"
                )
            _refuse_unused_flags(supports_mesh, supports_pmap)
            _enable_compilation_cache()
            if _coordinator_address() is not None:
                processes.initialize(
                    _coordinator_address(),
                    _NUM_PROCESSES.value,
                    _PROCESS_ID.value,
                    startup_timeout=_STARTUP_TIMEOUT.value,
                    heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
                )
            main()
        except InputError as error:
            processes.exit_all(f"error: {' '.join(str(error).splitlines())}")
        except jax.errors.JaxRuntimeError:
            processes.wait_for_watchdog()
            raise

    app.run(run_and_report_errors)


def _coordinator_address() -> str | None:
    return _COORDINATOR.value or os.environ.get("JAX_COORDINATOR_ADDRESS")


def _refuse_unused_flags(supports_mesh: bool, supports_pmap: bool) -> None:
    """Refuses flags that this program does not read, or that have no meaning beside others."""

    def refuse(names: tuple[str, ...], why: str) -> None:
        for name in names:
            if flags.FLAGS[name].present:
                raise InputError(f"--{name}: {why}; leave it out")

    process_flags = (
        "num_processes",
        "process_id",
        "startup_timeout",
        "heartbeat_timeout",
    )
    if not supports_mesh:
        refuse(
            ("mesh", "coordinator", *process_flags), "this program runs on one device"
        )
    if not supports_pmap:
        refuse(("pmap",), "this program has nothing that it could spread so")
    if _coordinator_address() is None:
        refuse(
            process_flags, "it is of several processes, and there is no --coordinator"
        )
    elif _PMAP.value:
        raise InputError("--pmap is for one process; several share a --mesh")
    if _PMAP.value and _MESH.value is not None:
        raise InputError("--pmap and --mesh are two ways to the same; give one")


def _enable_compilation_cache() -> None:
    """Turns JAX's cache of compiled programs on, unless told otherwise or it cannot be written."""
    requested_folder = _COMPILATION_CACHE.value
    if requested_folder == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if requested_folder is None and jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    cache_root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(
        requested_folder or pathlib.Path(cache_root, "continuous_lm", "jax")
    ).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except (OSError, InputError):
        if requested_folder is not None:
            raise InputError(
                f"--compilation_cache: {folder} cannot be written"
            ) from None
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def mesh() -> Mesh | None:
    """--mesh, on which a program's parameters lie; None for one device."""
    if _MESH.value is None and jax.process_count() == 1:
        return None
    return make_mesh(_MESH.value)


def uses_pmap() -> bool:
    """--pmap."""
    return bool(_PMAP.value)


def output_dir(program_name: str) -> pathlib.Path:
    """The folder for the results of program `program_name`, known to be writable."""
    folder = pathlib.Path(_OUTPUT_DIR.value or pathlib.Path("results") / program_name)
    check_writable(folder)
    return folder


def record() -> dict[str, Any]:
    """Flags, versions and device of this run, for its results file."""
    return settings() | {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
    }


def settings() -> dict[str, Any]:
    """What `record` says but for the devices, which are not touched."""
    packages = ("jax", "jaxlib", "flax", "numpy", "tokenizers")
    package = "continuous_lm.experiments."
    ours = {
        flag.name: flag.value
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith(package) or module == sys.argv[0]
        for flag in defined
    }
    return {
        "flags": dict(sorted(ours.items())),
        "versions": {
            "continuous_lm": clm.__version__,
            "python": platform.python_version(),
        }
        | {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
