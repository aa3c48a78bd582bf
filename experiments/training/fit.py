"""One training loop for any model: AdamW, logs, and checkpoints to resume from.

Steps are counted from 1. A dispatch runs `steps_per_dispatch` steps in one jitted call and ends at
a multiple of that number. Checkpoints are written between dispatches. A resumed run therefore
repeats the same calls, and on the same machine and core count its parameters are bitwise equal to
those of an uninterrupted run. `run_folder` has the files.

Parameters keep their sharding on a mesh, and rows of batches are sharded over its data axis. Every
process draws the same batches and holds its shard of them.
"""

import dataclasses
import functools
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from tqdm import tqdm

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError
from continuous_lm.experiments.training import run_folder
from continuous_lm.experiments.training.run_folder import (
    BatchIterator,
    NamedArrays,
    TrainState,
)
from continuous_lm.experiments.training.run_log import RunLog
from continuous_lm.experiments.training.stop_signals import catch_stop_signals
from continuous_lm.io.atomic_files import absolute_path, check_writable
from continuous_lm.parallel import processes

PMAP_AXIS = "devices"

Params = TypeVar("Params")
Batch = TypeVar("Batch")
Params_contra = TypeVar("Params_contra", contravariant=True)
Batch_contra = TypeVar("Batch_contra", contravariant=True)


class LossFunction(Protocol[Params_contra, Batch_contra]):
    """A loss of parameters on a batch."""

    def __call__(
        self, params: Params_contra, batch: Batch_contra, key: jax.Array, /
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return a scalar, and scalars to log.

        Where batches are accumulated, the loss should be a mean over rows.
        """


class Evaluation(Protocol[Params_contra]):
    """Numbers of parameters that are logged with a checkpoint."""

    def __call__(self, params: Params_contra, /) -> Mapping[str, float]:
        """Return the numbers by name."""


# The function of `make_train_steps`: (trained parameters, optimiser state, frozen parameters,
# batches, steps made before, key) -> trained parameters, optimiser state, metrics [steps].
TrainSteps = Callable[
    [NamedArrays, optax.OptState, NamedArrays, object, int, jax.Array],
    tuple[NamedArrays, optax.OptState, NamedArrays],
]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Settings of training.

    Attributes:
      steps: total number of optimiser steps.
      learning_rate: peak learning rate, reached by a linear warm-up from 0.
      batch_size: rows of a batch.
      warm_up: steps of the warm-up, at most half of all steps.
      final_share: final learning rate of the cosine decay, as a share of the peak.
      b1: decay of AdamW's mean of gradients.
      b2: decay of AdamW's mean of squared gradients.
      weight_decay: AdamW's weight decay (Loshchilov and Hutter, arXiv:1711.05101), only of
        matrices; see `has_weight_decay`.
      clip: largest global norm of a gradient.
      accumulate: gradient-accumulation steps: micro-batches of a batch, whose gradients are
        averaged.
      compute_dtype: dtype to which floating-point parameters are cast for the loss. Gradients, the
        optimiser and the batch keep their dtypes. None: no cast.
      seed: seed of the keys. The key of a step and micro-batch depends only on their numbers.
      steps_per_dispatch: steps in one jitted call.
      save_every: steps between checkpoints, which are written at the end of a dispatch.
      pmap: spread micro-batches over this process's devices with `jax.pmap`; `accumulate` must be a
        multiple of their number. A mesh supports more (see `parallel`).

    Raises:
      InputError: if a count is below 1, or `clip` is not above 0.
    """

    steps: int
    learning_rate: float
    batch_size: int = 32
    warm_up: int = 100
    final_share: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    compute_dtype: str | None = None
    seed: int = 0
    steps_per_dispatch: int = 10
    save_every: int = 500
    pmap: bool = False

    def __post_init__(self) -> None:
        counts = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "steps_per_dispatch": self.steps_per_dispatch,
            "save_every": self.save_every,
        }
        for name, count in counts.items():
            if count < 1:
                raise InputError(f"{name} must be at least 1, not {count}")
        if not self.clip > 0:
            raise InputError(
                f"clip is {self.clip}; it must be above 0, or all gradients would be 0"
            )


def fit(
    loss_function: LossFunction[Params, Batch],
    params: Params,
    batch_iterator: BatchIterator[object],
    *,
    folder: str | os.PathLike[str],
    config: FitConfig,
    is_frozen: Callable[[str], bool] | None = None,
    settings: Mapping[str, Any] | None = None,
    evaluate: Evaluation[Params] | None = None,
    tokens_per_step: int | None = None,
    label: str = "training",
) -> Params:
    """Train to the last step, resuming the run in `folder` if there is one.

    Args:
      loss_function: function of parameters, a batch and a key.
      params: initial parameters, a tree of arrays; not changed.
      batch_iterator: iterator over the batch of each step, a tree of NumPy arrays.
      folder: folder of the run.
      config: training settings.
      is_frozen: predicate of a parameter's path ("layers/attention/q"). A frozen parameter has no
        gradient and no optimiser state, and is not in checkpoints.
      settings: other settings that must be equal to resume a run (data, model), as JSON.
      evaluate: function of the parameters whose numbers are logged with a checkpoint.
      tokens_per_step: tokens in a step, for the logged speed.
      label: label of the progress bar.

    Returns:
      All parameters after `config.steps`, including frozen ones.

    Raises:
      InputError: if the folder holds a run with other settings or cannot be written, the loss is
        NaN or infinite, or a batch cannot be split. The last good checkpoint stays.

    SIGTERM and SIGINT (Ctrl-C) take effect at the end of a dispatch, after its checkpoint. A second
    signal takes effect immediately.
    """
    folder = absolute_path(folder)
    trained_params, frozen_params = split_params(params, is_frozen)
    mesh = axes_lib.mesh_of(next(iter(trained_params.values())))
    _check_pmap(config, mesh)
    optimizer = make_optimizer(config, trained_params)
    initial_state = TrainState(
        0, trained_params, _init_optimizer(optimizer, trained_params, mesh)
    )
    check_writable(folder)
    run_folder.check_settings(
        folder, run_settings(config, trained_params, frozen_params, settings or {})
    )
    state = run_folder.restore_or_init(folder, initial_state, batch_iterator)
    state = _commit_placement(state)
    merge = functools.partial(run_folder.replace_leaves, params)
    run = _Run(
        folder,
        config,
        _BatchSource(batch_iterator, config, mesh),
        make_train_steps(
            loss_function, optimizer, merge, config, _shardings(state, mesh)
        ),
        merge,
        frozen_params,
        evaluate,
        tokens_per_step,
    )
    with (
        catch_stop_signals() as caught_signals,
        RunLog(folder, state.step) as log,
        _progress_bar(config, state.step, label) as progress,
    ):
        state, is_stopped = train_loop(run, state, log, progress, caught_signals)
    if is_stopped or caught_signals:
        signal.raise_signal(caught_signals[0] if caught_signals else signal.SIGTERM)
    return merge(state.params | frozen_params)


# --- The start ------------------------------------------------------------------------------------


def split_params(
    params: object, is_frozen: Callable[[str], bool] | None
) -> tuple[NamedArrays, NamedArrays]:
    """Trained and frozen parameters by path; the trained ones are copies, as they are donated.

    Raises:
      InputError: if all are frozen.
    """
    trained_params: NamedArrays = {}
    frozen_params: NamedArrays = {}
    for name, leaf in run_folder.leaves_by_path(params).items():
        if is_frozen is not None and is_frozen(name):
            frozen_params[name] = leaf
        else:
            trained_params[name] = jnp.array(leaf)
    if not trained_params:
        raise InputError("all parameters are frozen")
    return trained_params, frozen_params


def _check_pmap(config: FitConfig, mesh: Mesh | None) -> None:
    if not config.pmap:
        return
    if mesh is not None:
        raise InputError("pmap is for parameters that lie on no mesh")
    if config.accumulate % jax.local_device_count():
        raise InputError(
            f"pmap spreads micro-batches over {jax.local_device_count()} devices: accumulate must"
            f" be a multiple of that, not {config.accumulate}"
        )


def run_settings(
    config: FitConfig,
    trained_params: NamedArrays,
    frozen_params: NamedArrays,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings that must be equal to resume a run."""
    return {
        "steps": config.steps,
        "learning_rate": config.learning_rate,
        "warm_up": config.warm_up,
        "final": config.final_share,
        "b1": config.b1,
        "b2": config.b2,
        "weight_decay": config.weight_decay,
        "clip": config.clip,
        "accumulate": config.accumulate,
        "compute_dtype": config.compute_dtype,
        "seed": config.seed,
        "parameters": {
            name: run_folder.dtype_and_shape(leaf)
            for name, leaf in trained_params.items()
        },
        "frozen": run_folder.checksum(frozen_params),
        "settings": dict(settings),
    }


def make_schedule(config: FitConfig) -> optax.Schedule:
    """From 0 over `warm_up` steps (half of all at most), then a cosine to final_share x peak."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warm_up, config.steps // 2),
        config.steps,
        end_value=config.final_share * config.learning_rate,
    )


def has_weight_decay(name: str, array: jax.Array) -> bool:
    """Return whether weight decay is for this parameter: not for vectors, scales and biases.

    The leading axis of parameters under "layers" counts the layers.
    """
    *parent_names, leaf_name = name.split("/")
    num_axes = array.ndim
    if "layers" in parent_names:
        num_axes -= 1
    words = leaf_name.split("_")
    return num_axes >= 2 and not {"bias", "scale", "norm"}.intersection(words)


def make_optimizer(
    config: FitConfig, trained_params: NamedArrays
) -> optax.GradientTransformation:
    """AdamW of clipped gradients, with weight decay for matrices alone."""
    decay_mask = {
        name: has_weight_decay(name, leaf) for name, leaf in trained_params.items()
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            make_schedule(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


def _init_optimizer(
    optimizer: optax.GradientTransformation,
    trained_params: NamedArrays,
    mesh: Mesh | None,
) -> optax.OptState:
    """The optimiser's first state; its scalars lie on the mesh, as the parameters do."""
    return jax.tree.map(
        lambda leaf: leaf if leaf.ndim else axes_lib.place(mesh, leaf, ""),
        optimizer.init(trained_params),
    )


def _commit_placement(state: TrainState) -> TrainState:
    """Return the state with its arrays committed to their devices, as restored arrays are.

    Otherwise the steps of a resumed run would be compiled differently.
    """
    params, optimizer_state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, leaf.sharding),
        (state.params, state.optimizer_state),
    )
    return TrainState(state.step, params, optimizer_state)


def _shardings(state: TrainState, mesh: Mesh | None) -> tuple[Any, Any, None] | None:
    """Shardings of the results of `make_train_steps`; None without a mesh."""
    if mesh is None:
        return None
    params, optimizer_state = jax.tree.map(
        lambda leaf: leaf.sharding, (state.params, state.optimizer_state)
    )
    return params, optimizer_state, None


# --- The batches of a dispatch --------------------------------------------------------------------


class _BatchSource:
    """Draws the batches of one dispatch after the other."""

    def __init__(
        self,
        batch_iterator: BatchIterator[object],
        config: FitConfig,
        mesh: Mesh | None,
    ):
        self.batch_iterator = batch_iterator
        self.config = config
        self.mesh = mesh

    def num_steps(self, step: int) -> int:
        """The number of steps of the dispatch after `step`; 0 at the end of the run."""
        steps_per_dispatch = self.config.steps_per_dispatch
        steps_to_multiple = steps_per_dispatch - step % steps_per_dispatch
        return min(steps_to_multiple, self.config.steps - step)

    def draw(self, step: int) -> object | None:
        """The batches of the dispatch after `step`, placed; None at the end of the run."""
        num_steps = self.num_steps(step)
        if not num_steps:
            return None
        batches = [next(self.batch_iterator) for _ in range(num_steps)]
        return _place_batches(
            self.mesh, _stack_batches(batches, self.config.accumulate)
        )


def _stack_batches(batches: list[object], accumulate: int) -> object:
    """Batches of some steps as one tree with leading axes [steps, micro-batches, rows]."""

    def stack(*leaves: np.ndarray) -> np.ndarray:
        num_rows = leaves[0].shape[0]
        if num_rows % accumulate:
            raise InputError(
                f"a batch of {num_rows} rows cannot be cut into {accumulate} equal parts"
            )
        array = np.stack(leaves)
        return array.reshape(len(leaves), accumulate, -1, *array.shape[2:])

    return jax.tree.map(stack, *batches)


def _place_batches(mesh: Mesh | None, batches: object) -> object:
    """Batches as `_stack_batches` makes them, their rows over the mesh's data axis."""

    def place_leaf(leaf: np.ndarray) -> ArrayLike:
        row_axes = ["-"] * (leaf.ndim - 3)
        return axes_lib.place(mesh, leaf, " ".join(["- - B", *row_axes]))

    return jax.tree.map(place_leaf, batches)


# --- The steps ------------------------------------------------------------------------------------


def make_train_steps(
    loss_function: LossFunction[Params, Batch],
    optimizer: optax.GradientTransformation,
    merge: Callable[[NamedArrays], Params],
    config: FitConfig,
    shardings: tuple[Any, Any, None] | None = None,
) -> TrainSteps:
    """Return the compiled function that runs the steps of a dispatch.

    Args:
      loss_function: as in `fit`.
      optimizer: optimiser of the trained parameters by path.
      merge: function from all parameters by path to the loss function's tree.
      config: training settings; only `compute_dtype` and `pmap` are read.
      shardings: shardings of the results, if given.

    Returns:
      A function of five groups of arguments. The first are the trained parameters and the
      optimiser's state, which are donated (not by pmap). The others are the frozen parameters, the
      batches from `_stack_batches`, the number of earlier steps, and the run's key.
    """
    mean_gradients = _make_mean_gradients(loss_function, merge, config)

    def train_steps(trained, optimizer_state, frozen, batches, steps_before, key):
        num_steps, num_parts = jax.tree.leaves(batches)[0].shape[:2]
        part_indices = jnp.arange(num_parts)
        if config.pmap:
            part_indices += num_parts * jax.lax.axis_index(PMAP_AXIS)

        def step(carry, item):
            trained, optimizer_state = carry
            step_index, micro_batches = item
            step_key = jax.random.fold_in(key, step_index)
            gradients, metrics = mean_gradients(
                trained, frozen, micro_batches, part_indices, step_key
            )
            metrics["gradient_norm"] = _global_norm(gradients)
            updates, optimizer_state = optimizer.update(
                gradients, optimizer_state, trained
            )
            return (optax.apply_updates(trained, updates), optimizer_state), metrics

        step_indices = steps_before + jnp.arange(num_steps)
        (trained, optimizer_state), metrics = jax.lax.scan(
            step, (trained, optimizer_state), (step_indices, batches)
        )
        return trained, optimizer_state, metrics

    if config.pmap:
        return _pmap_train_steps(train_steps)
    return jax.jit(train_steps, donate_argnums=(0, 1), out_shardings=shardings)


def _make_mean_gradients(
    loss_function: LossFunction[Params, Batch],
    merge: Callable[[NamedArrays], Params],
    config: FitConfig,
) -> Callable[..., tuple[NamedArrays, NamedArrays]]:
    """The function of a step's gradients and metrics, means over its micro-batches.

    It takes the trained and frozen parameters, micro-batches [micro-batches, rows, ...], their
    indices and the step's key.
    """

    def objective(trained, frozen, batch, key):
        params = merge(trained | frozen)
        return loss_function(_cast_floating(params, config.compute_dtype), batch, key)

    def mean_gradients(trained, frozen, micro_batches, part_indices, key):
        """Means over the micro-batches of a step: gradients, and metrics."""

        def add_gradients(gradient_sum, part):
            part_index, batch = part
            part_key = jax.random.fold_in(key, part_index)
            (loss, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(
                trained, frozen, batch, part_key
            )
            gradient_sum = jax.tree.map(jnp.add, gradient_sum, gradients)
            return gradient_sum, {**metrics, "loss": loss}

        zeros = jax.tree.map(jnp.zeros_like, trained)
        gradient_sum, metrics = jax.lax.scan(
            add_gradients, zeros, (part_indices, micro_batches)
        )
        gradients = jax.tree.map(lambda leaf: leaf / len(part_indices), gradient_sum)
        metrics = jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)
        if config.pmap:
            gradients, metrics = jax.lax.pmean((gradients, metrics), PMAP_AXIS)
        return gradients, metrics

    return mean_gradients


def _pmap_train_steps(train_steps: TrainSteps) -> TrainSteps:
    """The steps with the micro-batches of each device in front."""
    in_axes = (None, None, None, 0, None, None)
    pmapped_steps = jax.pmap(
        train_steps, axis_name=PMAP_AXIS, in_axes=in_axes, out_axes=None
    )

    def split_over_devices(
        trained, optimizer_state, frozen, batches, steps_before, key
    ):
        num_devices = jax.local_device_count()
        device_batches = jax.tree.map(
            lambda leaf: np.stack(np.split(leaf, num_devices, axis=1)), batches
        )
        return pmapped_steps(
            trained, optimizer_state, frozen, device_batches, steps_before, key
        )

    return split_over_devices


def _cast_floating(params: Params, compute_dtype: str | None) -> Params:
    """Parameters of which the floating ones have `compute_dtype`, unless that is None."""
    if compute_dtype is None:
        return params

    def cast_leaf(leaf: jax.Array) -> jax.Array:
        is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(compute_dtype) if is_floating else leaf

    cast_params: Params = jax.tree.map(cast_leaf, params)
    return cast_params


def _global_norm(gradients: NamedArrays) -> jax.Array:
    """The Euclidean norm of all gradients together, a scalar."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in gradients.values()]
    return jnp.sqrt(sum(squares[1:], squares[0]))


# --- The loop -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run(Generic[Params]):
    """The parts of a run that stay the same from dispatch to dispatch."""

    folder: pathlib.Path
    config: FitConfig
    batch_source: _BatchSource
    train_steps: TrainSteps
    merge: Callable[[NamedArrays], Params]
    frozen_params: NamedArrays
    evaluate: Evaluation[Params] | None
    tokens_per_step: int | None

    def is_checkpoint_due(self, steps_before: int, step: int) -> bool:
        save_every = self.config.save_every
        is_last_step = step == self.config.steps
        return is_last_step or step // save_every > steps_before // save_every

    def evaluation_metrics(self, state: TrainState) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        params = self.merge(state.params | self.frozen_params)
        return {name: float(value) for name, value in self.evaluate(params).items()}

    def speed(self, num_steps: int, seconds: float) -> dict[str, float]:
        speed = {"seconds": seconds, "steps_per_second": num_steps / seconds}
        if self.tokens_per_step is not None:
            num_tokens = num_steps * self.tokens_per_step
            speed["tokens_per_second"] = num_tokens / seconds
        return speed


def train_loop(
    run: _Run[Params],
    state: TrainState,
    log: RunLog,
    progress: tqdm,
    caught_signals: list[int],
) -> tuple[TrainState, bool]:
    """Make dispatches until the run is at its end or a process got a signal to stop.

    Returns:
      The state, of which a checkpoint is written, and whether it was stopped: a signal that one
      process got stops all of them.
    """
    key = jax.random.key(run.config.seed)
    schedule = make_schedule(run.config)
    is_stopped = False
    start_time = time.perf_counter()
    batches = run.batch_source.draw(state.step)
    while batches is not None and not is_stopped:
        steps_before = state.step
        num_steps = run.batch_source.num_steps(steps_before)
        trained_params, optimizer_state, step_metrics = run.train_steps(
            state.params,
            state.optimizer_state,
            run.frozen_params,
            batches,
            steps_before,
            key,
        )
        state = TrainState(steps_before + num_steps, trained_params, optimizer_state)
        data_position = run.batch_source.batch_iterator.get_state()
        batches = run.batch_source.draw(state.step)  # while the device computes
        host_metrics = _gather_metrics(step_metrics)
        _check_finite(run.folder, host_metrics, steps_before)
        metrics = {
            name: float(np.mean(values, dtype=np.float64))
            for name, values in host_metrics.items()
        }
        speed = run.speed(num_steps, time.perf_counter() - start_time)
        checkpoint_due = run.is_checkpoint_due(steps_before, state.step)
        if checkpoint_due:
            metrics |= run.evaluation_metrics(state)
        metrics["learning_rate"] = float(schedule(state.step - 1))
        log.write(state.step, metrics, speed)
        is_stopped = processes.any_process(bool(caught_signals))
        if checkpoint_due or is_stopped:
            run_folder.save_checkpoint(run.folder, state, data_position)
        progress.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
        progress.update(num_steps)
        start_time = time.perf_counter()
    return state, is_stopped


def _progress_bar(config: FitConfig, step: int, label: str) -> tqdm:
    """The progress bar of process 0."""
    return tqdm(
        total=config.steps,
        initial=step,
        desc=label,
        unit="step",
        mininterval=1.0,
        disable=not processes.is_first_process(),
    )


def _gather_metrics(step_metrics: NamedArrays) -> dict[str, np.ndarray]:
    """The metrics of each step [steps] in every process; the loss comes first."""
    names = dict.fromkeys(["loss", *step_metrics])
    return {
        name: np.asarray(processes.gather_to_hosts(step_metrics[name]))
        for name in names
    }


def _check_finite(
    folder: pathlib.Path, metrics: Mapping[str, np.ndarray], steps_before: int
) -> None:
    """Raise InputError, before a checkpoint is written, for a non-finite loss or gradient."""
    is_not_finite = ~np.isfinite([metrics["loss"], metrics["gradient_norm"]])
    if not is_not_finite.any():
        return
    index = int(np.flatnonzero(is_not_finite.any(axis=0))[0])
    name = "loss" if is_not_finite[0, index] else "gradient_norm"
    raise InputError(
        f"the {name.replace('_', ' ')} is {metrics[name][index]} in step"
        f" {steps_before + index + 1}; {run_folder.describe_last_checkpoint(folder)}. Lower"
        " the learning rate, and choose another folder"
    )
