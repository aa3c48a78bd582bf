"""Programs as functions: a frozen `Config`, and `run(config) -> Result`; flags are its fields.

A program is a module such as

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(program.DeviceConfig):                 # or RunConfig, on one device; PmapConfig
        \"\"\"Flags of this program.\"\"\"                      # heads them in --help

        word: str = program.flag("apple", help="The word that is repeated.")
        repetitions: int = program.flag(4, help="Number of repetitions.", lower_bound=1)
        category: str | None = program.flag(None, help="Category of the word.")
        change: Literal["both", "mass"] = program.flag("both", help="Effect of durations.")
        models: tuple[str, ...] = program.flag((), help="Folders, separated by commas.")

    @dataclasses.dataclass(frozen=True)
    class Result(program.Result):
        probabilities: np.ndarray                       # the results, typed

        def summary(self) -> str: ...                   # the text that the command prints

    def run(config: Config) -> Result:
        folder = program.output_folder(config)          # None: no files
        mesh = program.make_mesh(config)
        ...
        if folder is not None and processes.is_first_process():
            write_json(folder / "name.json", {..., "run": program.record(config)})
        return Result(...)

    if __name__ == "__main__":
        program.main(Config, run)

and a line in `continuous_lm.experiments.PROGRAMS`. Then `python -m continuous_lm NAME --word=cat`
runs it. In a notebook, `run(Config(word="cat"))` runs it without flags. The type of a field is the
type of its flag: bool, int, float, str, Literal (one of several words), X | None, or tuple[X, ...]
(separated by commas, or given several times with `repeated`). A field may be another dataclass of
flags, which become flags of the program. Values are checked when a Config is made. A
`__post_init__` can check further conditions; it must call `super().__post_init__()`.

With several processes, each runs the whole program, and only process 0 writes. To resume a run, all
processes must be able to read the output folder.
"""

import dataclasses
import datetime
import importlib.metadata
import math
import os
import pathlib
import platform
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
from absl import flags, logging
from jax.sharding import Mesh

import continuous_lm as clm
from continuous_lm.errors import InputError
from continuous_lm.io.atomic_files import check_writable
from continuous_lm.parallel import mesh as mesh_lib
from continuous_lm.parallel import processes

Value = TypeVar("Value")

HELP_FLAGS = {"--help", "--helpfull", "--helpshort", "-help", "-h", "-?"}
_PROCESS_FLAGS = (
    "num_processes",
    "process_id",
    "startup_timeout",
    "heartbeat_timeout",
)
TYPE_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "text"}

# --- Fields -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FlagDescription:
    """Properties of a flag besides its type and default."""

    help: str
    choices: tuple[str, ...]
    lower_bound: float | None
    upper_bound: float | None
    is_repeated: bool


def flag(
    default: Value,
    *,
    help: str,
    choices: Sequence[str] = (),
    lower_bound: float | None = None,
    upper_bound: float | None = None,
    repeated: bool = False,
) -> Value:
    """A field of a Config that is a flag of its program.

    Args:
      default: the value if it is not given.
      help: a phrase that stands alone in --help.
      choices: the words allowed, of a str or of each part of a tuple; Literal says them by itself.
      lower_bound: the smallest number allowed.
      upper_bound: the largest.
      repeated: for a tuple: the flag is given once for each part, which may hold commas.
    """
    description = FlagDescription(
        help, tuple(choices), lower_bound, upper_bound, repeated
    )
    return dataclasses.field(default=default, metadata={"flag": description})


@dataclasses.dataclass(frozen=True)
class FlagField:
    """A field of a Config with its type taken apart."""

    name: str
    owner: type  # the class that defines it, whose docstring heads it in --help
    default: Any
    description: FlagDescription
    value_type: type  # bool, int, float or str; of the parts of a tuple
    choices: tuple[str, ...]
    is_optional: bool
    is_tuple: bool

    def check(self, value: object) -> object:
        """The value as the field holds it: a path becomes text, a list a tuple.

        Raises:
          InputError: naming the flag, if it has another type or is out of bounds.
        """
        if value is None and self.is_optional:
            return None
        if not self.is_tuple:
            return self._check_part(value)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InputError(f"--{self.name} is {value!r}; it must be a list")
        return tuple(self._check_part(part) for part in value)

    def _check_part(self, value: object) -> object:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.value_type is float and type(value) is int:
            value = float(value)
        is_of_type = isinstance(value, self.value_type)
        if not is_of_type or (isinstance(value, bool) and self.value_type is not bool):
            expected = TYPE_NAMES[self.value_type]
            raise InputError(f"--{self.name} is {value!r:.60}; it must be {expected}")
        if self.choices and value not in self.choices:
            valid_names = ", ".join(self.choices)
            raise InputError(
                f"--{self.name} is {value!r:.60}; it must be of {valid_names}"
            )
        if isinstance(value, int | float):
            self._check_bounds(value)
        return value

    def _check_bounds(self, value: float) -> None:
        if math.isinf(value):
            raise InputError(f"--{self.name} is {value}; it must be finite")
        lower_bound = self.description.lower_bound
        upper_bound = self.description.upper_bound
        if lower_bound is not None and not value >= lower_bound:
            raise InputError(
                f"--{self.name} is {value}; it must be at least {lower_bound:g}"
            )
        if upper_bound is not None and not value <= upper_bound:
            raise InputError(
                f"--{self.name} is {value}; it must be at most {upper_bound:g}"
            )


def _flag_field(config_class: type, name: str, annotation: Any) -> FlagField:
    """Take a field's type apart; the default is that of its class."""
    owner = next(
        c for c in config_class.__mro__ if name in vars(c).get("__annotations__", {})
    )
    field = config_class.__dataclass_fields__[name]  # type: ignore[attr-defined]
    description = field.metadata["flag"]
    is_optional = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    if is_optional:
        (annotation,) = set(typing.get_args(annotation)) - {types.NoneType}
    is_tuple = typing.get_origin(annotation) is tuple
    if is_tuple:
        annotation, _ = typing.get_args(annotation)
    choices = description.choices
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        annotation = str
    if annotation not in TYPE_NAMES:
        raise TypeError(f"{config_class.__name__}.{name}: no flag is of {annotation}")
    return FlagField(
        name,
        owner,
        field.default,
        description,
        annotation,
        choices,
        is_optional,
        is_tuple,
    )


def _fields(config_class: type) -> dict[str, FlagField | type]:
    """Field name -> a flag, or the dataclass of flags that it holds."""
    annotations = typing.get_type_hints(config_class)
    fields: dict[str, FlagField | type] = {}
    for field in dataclasses.fields(config_class):
        if "flag" in field.metadata:
            fields[field.name] = _flag_field(
                config_class, field.name, annotations[field.name]
            )
        elif dataclasses.is_dataclass(annotations[field.name]):
            fields[field.name] = annotations[field.name]
        else:
            raise TypeError(f"{config_class.__name__}.{field.name} is no program.flag")
    return fields


def flag_values(config: "CheckedConfig") -> dict[str, Any]:
    """Every flag's name and value, of nested dataclasses too, in alphabetical order."""
    values: dict[str, Any] = {}
    for name in _fields(type(config)):
        value = getattr(config, name)
        if isinstance(value, CheckedConfig):
            values |= flag_values(value)
        else:
            values[name] = list(value) if isinstance(value, tuple) else value
    return dict(sorted(values.items()))


# --- What programs share ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedConfig:
    """Flags whose types and bounds are checked; the base of all."""

    def __post_init__(self) -> None:
        for name, field in _fields(type(self)).items():
            if isinstance(field, FlagField):
                object.__setattr__(self, name, field.check(getattr(self, name)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(CheckedConfig):
    """Flags of every program."""

    output_dir: str | None = flag(
        None,
        help="Folder for the results.  [default: results/ and the program's name]",
    )
    compilation_cache: str | None = flag(
        None,
        help="Folder of JAX's persistent compilation cache, or none."
        "  [default: JAX_COMPILATION_CACHE_DIR, or continuous_lm/jax in the user's cache folder]",
    )

    def default_folder(self, program_name: str) -> str:
        """The folder below results/ where the command line writes, if none is given."""
        return program_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceConfig(RunConfig):
    """Flags of programs that run on many devices."""

    mesh: str | None = flag(
        None,
        help="Number of devices on each mesh axis, as in data=2,model=4."
        "  [default: one device; all on data, with several processes]",
    )
    coordinator: str | None = flag(
        None,
        help="host:port of process 0, for several processes. The port and the next one must be"
        " free. auto: from Slurm, Open MPI or a TPU slice."
        "  [default: JAX_COORDINATOR_ADDRESS]",
    )
    num_processes: int | None = flag(
        None, help="Number of processes.  [default: JAX_NUM_PROCESSES]", lower_bound=1
    )
    process_id: int | None = flag(
        None,
        help="Index of this process, from 0.  [default: JAX_PROCESS_ID]",
        lower_bound=0,
    )
    startup_timeout: int = flag(
        300, help="Seconds until all processes must have come.", lower_bound=1
    )
    heartbeat_timeout: int = flag(
        100, help="Seconds without a sign of life that end a run.", lower_bound=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if _coordinator_address(self) is not None:
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _PROCESS_FLAGS:
            if getattr(self, name) != defaults[name]:
                raise InputError(
                    f"--{name}: it is of several processes, and there is no --coordinator;"
                    " leave it out"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PmapConfig(DeviceConfig):
    """Flags of programs that run on many devices, by jax.pmap too."""

    pmap: bool = flag(False, help="Spread points or rows over all devices by jax.pmap.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pmap and _coordinator_address(self) is not None:
            raise InputError("--pmap is for one process; several share a --mesh")
        if self.pmap and self.mesh is not None:
            raise InputError("--pmap and --mesh are two ways to the same; give one")


class Result:
    """Base class of the results of programs; each program derives a frozen dataclass."""

    def summary(self) -> str:
        """The text that the command line prints."""
        return ""

    @property
    def exit_status(self) -> int:
        """With which the command line ends."""
        return 0


def make_mesh(config: DeviceConfig) -> Mesh | None:
    """The mesh on which a program's parameters lie; None for one device."""
    if config.mesh is None and jax.process_count() == 1:
        return None
    return mesh_lib.make_mesh(config.mesh)


def output_folder(config: RunConfig) -> pathlib.Path | None:
    """The folder for the results, known to be writable; None if nothing is to be written."""
    if config.output_dir is None:
        return None
    folder = pathlib.Path(config.output_dir)
    check_writable(folder)
    return folder


def record(config: RunConfig) -> dict[str, Any]:
    """Flags, versions and device of a run, for its results file."""
    return settings(config) | {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
    }


def settings(config: RunConfig) -> dict[str, Any]:
    """Return the contents of `record` without the devices, which are not initialised."""
    packages = ("jax", "jaxlib", "flax", "numpy", "tokenizers")
    package_versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "flags": flag_values(config),
        "versions": {
            "continuous_lm": clm.__version__,
            "python": platform.python_version(),
        }
        | package_versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


Config = TypeVar("Config", bound=RunConfig)


def with_values_of(config: Config, source: RunConfig) -> Config:
    """A program's Config with the flags that another's has too; its own run writes nothing."""
    shared_names = set(_fields(type(config))) & set(_fields(type(source)))
    shared_values = {name: getattr(source, name) for name in shared_names}
    return dataclasses.replace(config, **shared_values | {"output_dir": None})


# --- The command line -------------------------------------------------------------------------


def main(
    config_class: type[Config],
    run: Callable[[Config], Result],
    argv: Sequence[str] | None = None,
) -> None:
    """Run a program with flags; an `InputError` ends it with one line and exit status 1.

    Args:
      config_class: the program's Config.
      run: the program.
      argv: its name and flags; those of the command line if omitted.
    """
    name, *arguments = sys.argv if argv is None else argv
    name = pathlib.PurePath(name).stem
    if HELP_FLAGS.intersection(arguments):
        print(help_text(config_class, name))
        return
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # at absl's INFO libraries are chatty
    try:
        config = parse(config_class, name, arguments)
        _enable_compilation_cache(config)
        if isinstance(config, DeviceConfig):
            _join_processes(config)
        result = run(config)
    except InputError as error:
        processes.exit_all(f"error: {' '.join(str(error).splitlines())}")
    except jax.errors.JaxRuntimeError:
        processes.wait_for_watchdog()
        raise
    if not jax.distributed.is_initialized() or processes.is_first_process():
        print(f"{result.summary()}\n\nResults: {config.output_dir}", flush=True)
    if result.exit_status:
        sys.exit(result.exit_status)


def parse(config_class: type[Config], name: str, arguments: Sequence[str]) -> Config:
    """The Config of a command line; the results go to results/NAME if it names no folder.

    Raises:
      InputError: for flags that are unknown, or out of bounds.
    """
    flag_holder = _define_flags(config_class)
    try:
        _, *stray_arguments = flag_holder([name, *arguments])
    except flags.Error as error:
        raise InputError(f"{error}; --help lists the flags") from None
    if stray_arguments:
        raise InputError(
            f"{stray_arguments[0]!r} is not a flag; flags begin with --, see --help"
        )
    config = _read_flags(config_class, flag_holder)
    if config.output_dir is None:
        folder = pathlib.PurePath("results", config.default_folder(name))
        config = dataclasses.replace(config, output_dir=str(folder))
    return config


def help_text(config_class: type[RunConfig], name: str) -> str:
    """The module's docstring, and every flag under the docstring of the class that defines it."""
    flag_holder = _define_flags(config_class)
    used_headings = {_heading(field.owner) for field, _ in _all_flags(config_class)}
    own_headings = [
        _heading(owner) for owner in config_class.__mro__
    ]  # its own flags first
    nested_headings = sorted(used_headings - set(own_headings))
    headings = [h for h in own_headings if h in used_headings] + nested_headings
    usage = f"usage: python -m continuous_lm {name} [--flags]"
    description = (sys.modules[config_class.__module__].__doc__ or "").strip()
    groups = [flag_holder.module_help(heading).rstrip() for heading in headings]
    return "\n\n".join([usage, description, *(group.lstrip("\n") for group in groups)])


def _heading(owner: type) -> str:
    return (owner.__doc__ or owner.__name__).splitlines()[0].rstrip(".")


def _all_flags(
    config_class: type, defaults: Any = None
) -> Iterator[tuple[FlagField, Any]]:
    """Every flag with its default, those of nested dataclasses too."""
    for name, field in _fields(config_class).items():
        if isinstance(field, FlagField):
            yield field, field.default if defaults is None else getattr(defaults, name)
        else:
            nested = config_class.__dataclass_fields__[name].default  # type: ignore[attr-defined]
            yield from _all_flags(field, nested)


def _define_flags(config_class: type) -> flags.FlagValues:
    """The flags of a Config, in a namespace of their own."""
    flag_holder = flags.FlagValues()
    for field, default in _all_flags(config_class):
        flags.DEFINE_flag(
            _absl_flag(field, default), flag_holder, module_name=_heading(field.owner)
        )
    return flag_holder


def _absl_flag(field: FlagField, default: Any) -> flags.Flag:
    """A flag as absl has it; its value is None, a bool, a number, a text or a list of texts."""
    description = field.description
    name, help = field.name, description.help
    if field.is_tuple:
        texts = None if default is None else [str(part) for part in default]
        if description.is_repeated:
            return flags.MultiFlag(flags.ArgumentParser(), None, name, texts, help)
        serializer = flags.CsvListSerializer(",")
        return flags.Flag(flags.ListParser(), serializer, name, texts, help)
    if field.choices:
        return flags.EnumFlag(name, default, help, list(field.choices))
    if field.value_type is bool:
        return flags.BooleanFlag(name, default, help)
    parser: flags.ArgumentParser = flags.ArgumentParser()
    lower, upper = description.lower_bound, description.upper_bound
    if field.value_type is float:
        parser = flags.FloatParser(lower, upper)
    elif field.value_type is int:
        lower = None if lower is None else int(lower)
        upper = None if upper is None else int(upper)
        parser = flags.IntegerParser(lower, upper)
    return flags.Flag(parser, flags.ArgumentSerializer(), name, default, help)


def _read_flags(config_class: type[Config], flag_holder: flags.FlagValues) -> Config:
    """Make the Config, with nested configs, from parsed flags."""
    values: dict[str, Any] = {}
    for name, field in _fields(config_class).items():
        if isinstance(field, FlagField):
            values[name] = _read_value(field, flag_holder[name].value)
        else:
            values[name] = _read_flags(field, flag_holder)
    return config_class(**values)


def _read_value(field: FlagField, value: Any) -> Any:
    """A flag's value as its field holds it."""
    if value is None or not field.is_tuple:
        return value
    try:
        return tuple(field.value_type(text) for text in value)
    except ValueError:
        expected = TYPE_NAMES[field.value_type]
        raise InputError(
            f"--{field.name} is {','.join(value)}; each part must be {expected}"
        ) from None


def _join_processes(config: DeviceConfig) -> None:
    """Join the other processes, if there are any."""
    address = _coordinator_address(config)
    if address is None:
        return
    processes.initialize(
        address,
        config.num_processes,
        config.process_id,
        startup_timeout=config.startup_timeout,
        heartbeat_timeout=config.heartbeat_timeout,
    )


def _coordinator_address(config: DeviceConfig) -> str | None:
    return config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")


def _enable_compilation_cache(config: RunConfig) -> None:
    """Turn JAX's cache of compiled programs on, unless told otherwise or it cannot be written."""
    requested_folder = config.compilation_cache
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
