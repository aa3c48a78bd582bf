"""One training loop for any model: AdamW, logs, and checkpoints from which it goes on by itself.

Steps are counted from 1 and made some at a time in one call of a jitted function: a dispatch.
Dispatches end at multiples of their size and checkpoints are written where one ends, so a run that
was stopped anywhere and started again makes the same calls with the same numbers: on the same
machine and core count its parameters are the same bit by bit. `run_folder` has the files.

Parameters that lie on a mesh stay where they lie, rows of batches are spread over its data axis,
and the compiler does the rest. Every process draws the same batches and holds its part of them.
"""

import functools
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError
from continuous_lm.experiments.training import run_folder
from continuous_lm.io.atomic_files import absolute_path, check_writable
from continuous_lm.parallel import processes

LossFunction = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def fit(
    loss_function: LossFunction,
    params: Any,
    batch_iterator: run_folder.BatchIterator,
    *,
    folder: str | os.PathLike,
    steps: int,
    learning_rate: float,
    warm_up: int = 100,
    final_share: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    accumulate: int = 1,
    compute_dtype: Any = None,
    is_frozen: Callable[[str], bool] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    steps_per_dispatch: int = 10,
    save_every: int = 500,
    tokens_per_step: int | None = None,
    pmap: bool = False,
    label: str = "training",
) -> Any:
    """Trains, or goes on with the run in `folder`, to its end.

    Args:
      loss_function: (params, batch, key) -> scalar loss and a dict of scalars worth watching. Where
        batches are accumulated, it should be a mean over rows.
      params: initial parameters, a tree of arrays; not changed.
      batch_iterator: gives the batch of each step.
      folder: of the run.
      steps: optimiser steps in all.
      learning_rate: the peak, reached after `warm_up` steps (half of all at most) on a line from 0.
      warm_up: steps.
      final_share: the share of the peak at which a cosine ends.
      b1: decay of AdamW's mean of gradients.
      b2: decay of AdamW's mean of their squares.
      weight_decay: AdamW's (Loshchilov and Hutter, arXiv:1711.05101), of matrices alone; see
        `has_weight_decay`.
      clip: the largest global norm of a gradient.
      accumulate: micro-batches into which a batch is cut; gradients are averaged over them.
      compute_dtype: to which floating parameters are cast for `loss_function`; their gradients, the
        optimiser and the batch keep their own. None: none.
      is_frozen: says by a parameter's path ("layers/attention/q") that it is not trained: no
        gradient is taken for it, it has no optimiser state and is not in checkpoints.
      seed: of the keys; that of a step and micro-batch follows from their numbers alone.
      settings: what else must be the same for a run to go on (data, model), as JSON can hold.
      evaluate: params -> numbers to log with a checkpoint.
      steps_per_dispatch: steps in one call.
      save_every: steps between checkpoints, which are written where a dispatch ends.
      tokens_per_step: for the speed, if given.
      pmap: spread micro-batches over this process's devices by `jax.pmap`; `accumulate` must be a
        multiple of their number. It is for those who know it: a mesh does more (see `parallel`).
      label: of the progress bar.

    Returns:
      The parameters after `steps`, the frozen ones among them.

    Raises:
      InputError: if the folder holds a run of other settings or cannot be written, the loss is
        NaN or infinite, or a batch cannot be cut. The last good checkpoint is kept.

    SIGTERM and SIGINT (Ctrl-C) take effect at the end of a dispatch, when its checkpoint is
    written; a second one at once.
    """
    folder = absolute_path(folder)
    for name, value in dict(
        steps=steps,
        accumulate=accumulate,
        steps_per_dispatch=steps_per_dispatch,
        save_every=save_every,
    ).items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    named_params = run_folder.leaves_by_path(params)
    frozen_params = {
        name: leaf
        for name, leaf in named_params.items()
        if is_frozen is not None and is_frozen(name)
    }
    # Copies, as they are donated.
    trained_params = {
        name: jnp.array(leaf)
        for name, leaf in named_params.items()
        if name not in frozen_params
    }
    if not trained_params:
        raise InputError("all parameters are frozen")
    mesh = axes_lib.mesh_of(next(iter(trained_params.values())))
    if pmap and mesh is not None:
        raise InputError("pmap is for parameters that lie on no mesh")
    if pmap and accumulate % jax.local_device_count():
        raise InputError(
            f"pmap spreads micro-batches over {jax.local_device_count()} devices: accumulate must"
            f" be a multiple of that, not {accumulate}"
        )
    run_settings = dict(
        steps=steps,
        learning_rate=learning_rate,
        warm_up=warm_up,
        final=final_share,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        clip=clip,
        accumulate=accumulate,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype).name,
        seed=seed,
        parameters={
            name: run_folder.dtype_and_shape(leaf)
            for name, leaf in trained_params.items()
        },
        frozen=run_folder.checksum(frozen_params),
        settings=dict(settings or {}),
    )
    rate_schedule = make_schedule(
        learning_rate, steps=steps, warm_up=warm_up, final_share=final_share
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(
            rate_schedule,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask={
                name: has_weight_decay(name, leaf)
                for name, leaf in trained_params.items()
            },
        ),
    )
    optimizer_state = jax.tree.map(
        lambda leaf: leaf if leaf.ndim else axes_lib.place(mesh, leaf, ""),
        optimizer.init(trained_params),
    )
    check_writable(folder)
    run_folder.check_settings(folder, run_settings)
    step, *restored_arrays = run_folder.resume_run(
        folder, trained_params, optimizer_state, batch_iterator
    )
    # As firmly in their places whether read or not: what is compiled is to be the same.
    trained_params, optimizer_state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, leaf.sharding), restored_arrays
    )

    def draw_batches(step):
        num_batches = min(steps_per_dispatch - step % steps_per_dispatch, steps - step)
        return _place_batches(
            mesh,
            _stack_batches(
                [next(batch_iterator) for _ in range(num_batches)], accumulate
            ),
        )

    merge = functools.partial(run_folder.replace_leaves, params)
    shardings = None
    if mesh is not None:
        shardings = (
            *jax.tree.map(
                lambda leaf: leaf.sharding, (trained_params, optimizer_state)
            ),
            None,
        )
    train_steps = _make_train_steps(
        loss_function, optimizer, merge, compute_dtype, shardings, pmap
    )
    key = jax.random.key(seed)
    with (
        run_folder.catch_stop_signals() as stop_signals,
        run_folder.RunLog(folder, step) as log,
        tqdm(
            total=steps,
            initial=step,
            desc=label,
            unit="step",
            mininterval=1.0,
            disable=not processes.is_first_process(),
        ) as progress,
    ):
        start_time = time.perf_counter()
        batches = draw_batches(step) if step < steps else None
        is_stopped = False  # one that is asked to stop stops all processes
        while step < steps and not is_stopped:
            num_steps = jax.tree.leaves(batches)[0].shape[0]
            trained_params, optimizer_state, step_metrics = train_steps(
                trained_params, optimizer_state, frozen_params, batches, step, key
            )
            data_position = batch_iterator.get_state()
            step += num_steps
            batches = (
                draw_batches(step) if step < steps else None
            )  # while the device computes
            step_metrics = {
                name: processes.gather_to_hosts(step_metrics[name])
                for name in ("loss", *step_metrics)
            }
            _check_finite(folder, step_metrics, step - num_steps)
            mean_metrics = {
                name: float(np.mean(x, dtype=np.float64))
                for name, x in step_metrics.items()
            }
            seconds = time.perf_counter() - start_time
            speed = {"seconds": seconds, "steps_per_second": num_steps / seconds}
            if tokens_per_step is not None:
                speed["tokens_per_second"] = num_steps * tokens_per_step / seconds
            checkpoint_due = (
                step == steps or step // save_every > (step - num_steps) // save_every
            )
            if checkpoint_due and evaluate is not None:
                mean_metrics |= {
                    name: float(x)
                    for name, x in evaluate(
                        merge(trained_params | frozen_params)
                    ).items()
                }
            log.write(
                step,
                mean_metrics | {"learning_rate": float(rate_schedule(step - 1))},
                speed,
            )
            is_stopped = processes.any_process(bool(stop_signals))
            if checkpoint_due or is_stopped:
                run_folder.save_checkpoint(
                    folder, step, data_position, trained_params, optimizer_state
                )
            progress.set_postfix(loss=f"{mean_metrics['loss']:.4g}", refresh=False)
            progress.update(num_steps)
            start_time = time.perf_counter()
    if is_stopped or stop_signals:
        signal.raise_signal(stop_signals[0] if stop_signals else signal.SIGTERM)
    return merge(trained_params | frozen_params)


# --- The step -------------------------------------------------------------------------------------


def make_schedule(
    learning_rate: float, *, steps: int, warm_up: int, final_share: float
) -> optax.Schedule:
    """From 0 over `warm_up` steps (half of all at most), then a cosine to final_share x peak."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        learning_rate,
        min(warm_up, steps // 2),
        steps,
        end_value=final_share * learning_rate,
    )


def has_weight_decay(name: str, array: jax.Array) -> bool:
    """Whether weight decay is for this parameter: not for vectors, scales and biases.

    The leading axis of what lies under "layers" counts the layers.
    """
    *parent_names, leaf_name = name.split("/")
    num_axes = array.ndim - ("layers" in parent_names)
    return num_axes >= 2 and not {"bias", "scale", "norm"}.intersection(
        leaf_name.split("_")
    )


def _stack_batches(batches: list[Any], accumulate: int) -> Any:
    """Batches of some steps as one tree with leading axes [steps, micro-batches, rows]."""

    def stack(*leaves):
        rows = leaves[0].shape[0]
        if rows % accumulate:
            raise InputError(
                f"a batch of {rows} rows cannot be cut into {accumulate} equal parts"
            )
        array = np.stack(leaves)
        return array.reshape(len(leaves), accumulate, -1, *array.shape[2:])

    return jax.tree.map(stack, *batches)


def _place_batches(mesh: Mesh | None, batches: Any) -> Any:
    """What `_stack_batches` makes, its rows over the mesh's data axis."""
    return jax.tree.map(
        lambda x: axes_lib.place(mesh, x, "- - B" + " -" * (x.ndim - 3)), batches
    )


def _make_train_steps(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    merge: Callable[[Mapping[str, jax.Array]], Any],
    compute_dtype: Any,
    shardings: Any = None,
    pmap: bool = False,
) -> Callable:
    """The compiled function that makes some steps.

    It takes the trained parameters and the optimiser's state (donated, but not by pmap), the frozen
    parameters, batches as `_stack_batches` makes them, the number of steps made before and the
    run's key. What it returns lies in `shardings`, if they are given.
    """
    axis_name = "devices" if pmap else None

    def cast_floating(leaf):
        is_floating = compute_dtype is not None and jnp.issubdtype(
            leaf.dtype, jnp.floating
        )
        return leaf.astype(compute_dtype) if is_floating else leaf

    def train_steps(trained, state, fixed, batches, before, key):
        num_steps, num_micro_batches = jax.tree.leaves(batches)[0].shape[:2]
        part_indices = jnp.arange(num_micro_batches)
        if axis_name is not None:
            part_indices += num_micro_batches * jax.lax.axis_index(axis_name)

        def objective(trained, batch, key):
            return loss_function(
                jax.tree.map(cast_floating, merge(trained | fixed)), batch, key
            )

        def step(carry, item):
            trained_params, optimizer_state = carry
            step_index, batch = item

            def add_gradients(total, item):
                part_index, batch = item
                micro_batch_key = jax.random.fold_in(
                    jax.random.fold_in(key, step_index), part_index
                )
                (loss_value, metrics), gradients = jax.value_and_grad(
                    objective, has_aux=True
                )(trained_params, batch, micro_batch_key)
                return jax.tree.map(jnp.add, total, gradients), {
                    **metrics,
                    "loss": loss_value,
                }

            zeros = jax.tree.map(jnp.zeros_like, trained_params)
            gradient_sum, metrics = jax.lax.scan(
                add_gradients, zeros, (part_indices, batch)
            )
            gradients = jax.tree.map(
                lambda leaf: leaf / num_micro_batches, gradient_sum
            )
            metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)
            if axis_name is not None:
                gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
            metrics["gradient_norm"] = jnp.sqrt(
                sum(jnp.sum(jnp.square(x)) for x in gradients.values())
            )
            updates, optimizer_state = optimizer.update(
                gradients, optimizer_state, trained_params
            )
            return (
                optax.apply_updates(trained_params, updates),
                optimizer_state,
            ), metrics

        step_indices = before + jnp.arange(num_steps)
        (trained, state), metrics = jax.lax.scan(
            step, (trained, state), (step_indices, batches)
        )
        return trained, state, metrics

    if axis_name is None:
        return jax.jit(train_steps, donate_argnums=(0, 1), out_shardings=shardings)
    in_axes = (None, None, None, 0, None, None)
    pmapped_steps = jax.pmap(
        train_steps, axis_name=axis_name, in_axes=in_axes, out_axes=None
    )

    def split_over_devices(trained, state, fixed, batches, before, key):
        """Each device's micro-batches in front."""
        num_devices = jax.local_device_count()
        device_batches = jax.tree.map(
            lambda x: np.stack(np.split(x, num_devices, axis=1)), batches
        )
        return pmapped_steps(trained, state, fixed, device_batches, before, key)

    return split_over_devices


def _check_finite(
    folder: pathlib.Path, metrics: Mapping[str, np.ndarray], steps_done: int
) -> None:
    """Refuses to go on, and so to write a checkpoint, after a step that went wrong."""
    is_not_finite = ~np.isfinite([metrics["loss"], metrics["gradient_norm"]])
    if is_not_finite.any():
        index = int(np.flatnonzero(is_not_finite.any(axis=0))[0])
        name = "loss" if is_not_finite[0, index] else "gradient_norm"
        raise InputError(
            f"the {name.replace('_', ' ')} is {metrics[name][index]} in step"
            f" {steps_done + index + 1}; {run_folder.describe_last_checkpoint(folder)}. Lower"
            " the learning rate, and choose"
            " another folder"
        )
