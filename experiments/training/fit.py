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
from continuous_lm.io.atomic_files import as_path, check_writable
from continuous_lm.parallel import processes

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def fit(
    loss: Loss,
    params: Any,
    batches: run_folder.Batches,
    *,
    folder: str | os.PathLike,
    steps: int,
    learning_rate: float,
    warm_up: int = 100,
    final: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    accumulate: int = 1,
    compute_dtype: Any = None,
    frozen: Callable[[str], bool] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    dispatch: int = 10,
    save_every: int = 500,
    tokens_per_step: int | None = None,
    pmap: bool = False,
    label: str = "training",
) -> Any:
    """Trains, or goes on with the run in `folder`, to its end.

    Args:
      loss: (params, batch, key) -> scalar loss and a dict of scalars worth watching. Where batches
        are accumulated, it should be a mean over rows.
      params: initial parameters, a tree of arrays; not changed.
      batches: gives the batch of each step.
      folder: of the run.
      steps: optimiser steps in all.
      learning_rate: the peak, reached after `warm_up` steps (half of all at most) on a line from 0.
      warm_up: steps.
      final: the share of the peak at which a cosine ends.
      b1: decay of AdamW's mean of gradients.
      b2: decay of AdamW's mean of their squares.
      weight_decay: AdamW's (Loshchilov and Hutter, arXiv:1711.05101), of matrices alone; see
        `is_matrix`.
      clip: the largest global norm of a gradient.
      accumulate: micro-batches into which a batch is cut; gradients are averaged over them.
      compute_dtype: to which floating parameters are cast for `loss`; their gradients, the
        optimiser and the batch keep their own. None: none.
      frozen: says by a parameter's path ("layers/attention/q") that it is not trained: no gradient
        is taken for it, it has no optimiser state and is not in checkpoints.
      seed: of the keys; that of a step and micro-batch follows from their numbers alone.
      settings: what else must be the same for a run to go on (data, model), as JSON can hold.
      evaluate: params -> numbers to log with a checkpoint.
      dispatch: steps in one call.
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
    folder = as_path(folder)
    for name, value in dict(
        steps=steps, accumulate=accumulate, dispatch=dispatch, save_every=save_every
    ).items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    named = run_folder.named_leaves(params)
    fixed = {name: leaf for name, leaf in named.items() if frozen is not None and frozen(name)}
    # Copies, as they are donated.
    trained = {name: jnp.array(leaf) for name, leaf in named.items() if name not in fixed}
    if not trained:
        raise InputError("all parameters are frozen")
    mesh = axes_lib.mesh_of(next(iter(trained.values())))
    if pmap and mesh is not None:
        raise InputError("pmap is for parameters that lie on no mesh")
    if pmap and accumulate % jax.local_device_count():
        raise InputError(
            f"pmap spreads micro-batches over {jax.local_device_count()} devices: accumulate must"
            f" be a multiple of that, not {accumulate}"
        )
    said = dict(
        steps=steps,
        learning_rate=learning_rate,
        warm_up=warm_up,
        final=final,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        clip=clip,
        accumulate=accumulate,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype).name,
        seed=seed,
        parameters={name: run_folder.kind(leaf) for name, leaf in trained.items()},
        frozen=run_folder.digest(fixed),
        settings=dict(settings or {}),
    )
    rate = schedule(learning_rate, steps=steps, warm_up=warm_up, final=final)
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(
            rate,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask={name: is_matrix(name, leaf) for name, leaf in trained.items()},
        ),
    )
    state = jax.tree.map(
        lambda leaf: leaf if leaf.ndim else axes_lib.placed(mesh, leaf, ""), optimizer.init(trained)
    )
    check_writable(folder)
    run_folder.check_settings(folder, said)
    step, *arrays = run_folder.resume(folder, trained, state, batches)
    # As firmly in their places whether read or not: what is compiled is to be the same.
    trained, state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), arrays)

    def draw(step):
        count = min(dispatch - step % dispatch, steps - step)
        return _placed(mesh, _stacked([next(batches) for _ in range(count)], accumulate))

    whole = functools.partial(run_folder.rebuilt, params)
    places = None
    if mesh is not None:
        places = (*jax.tree.map(lambda leaf: leaf.sharding, (trained, state)), None)
    run = _dispatch(loss, optimizer, whole, compute_dtype, places, pmap)
    key = jax.random.key(seed)
    with (
        run_folder.asked_to_stop() as asked,
        run_folder.Log(folder, step) as log,
        tqdm(
            total=steps,
            initial=step,
            desc=label,
            unit="step",
            mininterval=1.0,
            disable=not processes.is_first(),
        ) as bar,
    ):
        began = time.perf_counter()
        part = draw(step) if step < steps else None
        stopped = False  # one that is asked to stop stops all processes
        while step < steps and not stopped:
            made = jax.tree.leaves(part)[0].shape[0]
            trained, state, watched = run(trained, state, fixed, part, step, key)
            position = batches.get_state()
            step += made
            part = draw(step) if step < steps else None  # while the device computes
            watched = {name: processes.fetch(watched[name]) for name in ("loss", *watched)}
            _check_finite(folder, watched, step - made)
            means = {name: float(np.mean(x, dtype=np.float64)) for name, x in watched.items()}
            seconds = time.perf_counter() - began
            speed = {"seconds": seconds, "steps_per_second": made / seconds}
            if tokens_per_step is not None:
                speed["tokens_per_second"] = made * tokens_per_step / seconds
            due = step == steps or step // save_every > (step - made) // save_every
            if due and evaluate is not None:
                means |= {name: float(x) for name, x in evaluate(whole(trained | fixed)).items()}
            log.write(step, means | {"learning_rate": float(rate(step - 1))}, speed)
            stopped = processes.anywhere(bool(asked))
            if due or stopped:
                run_folder.save(folder, step, position, trained, state)
            bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
            bar.update(made)
            began = time.perf_counter()
    if stopped or asked:
        signal.raise_signal(asked[0] if asked else signal.SIGTERM)
    return whole(trained | fixed)


# --- The step -------------------------------------------------------------------------------------


def schedule(learning_rate: float, *, steps: int, warm_up: int, final: float) -> optax.Schedule:
    """Linear from 0 over `warm_up` steps (half of all at most), then a cosine to final x peak."""
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warm_up, steps // 2), steps, end_value=final * learning_rate
    )


def is_matrix(name: str, array: jax.Array) -> bool:
    """Whether weight decay is for this parameter: not for vectors, scales and biases.

    The leading axis of what lies under "layers" counts the layers.
    """
    *folders, last = name.split("/")
    axes = array.ndim - ("layers" in folders)
    return axes >= 2 and not {"bias", "scale", "norm"}.intersection(last.split("_"))


def _stacked(batches: list[Any], accumulate: int) -> Any:
    """Batches of some steps as one tree with leading axes [steps, micro-batches, rows]."""

    def stack(*leaves):
        rows = leaves[0].shape[0]
        if rows % accumulate:
            raise InputError(f"a batch of {rows} rows cannot be cut into {accumulate} equal parts")
        array = np.stack(leaves)
        return array.reshape(len(leaves), accumulate, -1, *array.shape[2:])

    return jax.tree.map(stack, *batches)


def _placed(mesh: Mesh | None, batches: Any) -> Any:
    """What `_stacked` makes, its rows over the mesh's data axis."""
    return jax.tree.map(lambda x: axes_lib.placed(mesh, x, "- - B" + " -" * (x.ndim - 3)), batches)


def _dispatch(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    whole: Callable[[Mapping[str, jax.Array]], Any],
    compute_dtype: Any,
    places: Any = None,
    pmap: bool = False,
) -> Callable:
    """The compiled function that makes some steps.

    It takes the trained parameters and the optimiser's state (donated, but not by pmap), the frozen
    parameters, batches as `_stacked` makes them, the number of steps made before and the run's key.
    What it returns lies in `places`, if they are given.
    """
    axis = "devices" if pmap else None

    def cast(leaf):
        floating = compute_dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(compute_dtype) if floating else leaf

    def run(trained, state, fixed, batches, before, key):
        num_steps, num_parts = jax.tree.leaves(batches)[0].shape[:2]
        parts = jnp.arange(num_parts)
        if axis is not None:
            parts += num_parts * jax.lax.axis_index(axis)

        def objective(trained, batch, key):
            return loss(jax.tree.map(cast, whole(trained | fixed)), batch, key)

        def step(carry, item):
            trained, state = carry
            number, batch = item

            def add(total, item):
                part, batch = item
                own = jax.random.fold_in(jax.random.fold_in(key, number), part)
                (value, watched), grads = jax.value_and_grad(objective, has_aux=True)(
                    trained, batch, own
                )
                return jax.tree.map(jnp.add, total, grads), {**watched, "loss": value}

            zeros = jax.tree.map(jnp.zeros_like, trained)
            total, watched = jax.lax.scan(add, zeros, (parts, batch))
            grads = jax.tree.map(lambda leaf: leaf / num_parts, total)
            watched = jax.tree.map(lambda x: jnp.mean(x, axis=0), watched)
            if axis is not None:
                grads, watched = jax.lax.pmean((grads, watched), axis)
            watched["gradient_norm"] = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in grads.values()))
            updates, state = optimizer.update(grads, state, trained)
            return (optax.apply_updates(trained, updates), state), watched

        numbers = before + jnp.arange(num_steps)
        (trained, state), watched = jax.lax.scan(step, (trained, state), (numbers, batches))
        return trained, state, watched

    if axis is None:
        return jax.jit(run, donate_argnums=(0, 1), out_shardings=places)
    in_axes = (None, None, None, 0, None, None)
    mapped = jax.pmap(run, axis_name=axis, in_axes=in_axes, out_axes=None)

    def spread(trained, state, fixed, batches, before, key):
        """Each device's micro-batches in front."""
        count = jax.local_device_count()
        parts = jax.tree.map(lambda x: np.stack(np.split(x, count, axis=1)), batches)
        return mapped(trained, state, fixed, parts, before, key)

    return spread


def _check_finite(folder: pathlib.Path, watched: Mapping[str, np.ndarray], before: int) -> None:
    """Refuses to go on, and so to write a checkpoint, after a step that went wrong."""
    bad = ~np.isfinite([watched["loss"], watched["gradient_norm"]])
    if bad.any():
        index = int(np.flatnonzero(bad.any(axis=0))[0])
        name = "loss" if bad[0, index] else "gradient_norm"
        raise InputError(
            f"the {name.replace('_', ' ')} is {watched[name][index]} in step"
            f" {before + index + 1}; {run_folder.kept(folder)}. Lower the learning rate, and choose"
            " another folder"
        )
