"""Programs: `python -m continuous_lm` lists them, `... NAME --help` explains one.

A program is a module with a Config, whose fields are its flags, and `run(config)`:

    from continuous_lm.experiments.durations import counting
    result = counting.run(counting.Config(points=8))

`PROGRAMS` is the list, by group.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Program(NamedTuple):
    """A program of the command line."""

    module: str  # below continuous_lm.experiments
    summary: str  # one line


GROUPS: Mapping[str, Mapping[str, Program]] = {
    "Durations of one prompt": {
        "counting": Program(
            "durations.counting", "shrink repeated words and see the model count"
        ),
        "events": Program("durations.events", "shrink the events of a story"),
        "sums": Program("durations.sums", "shrink one number of a sum"),
        "interpolation": Program(
            "durations.interpolation", "turn one word into another"
        ),
        "boolean": Program(
            "durations.boolean", "turn one Boolean operator into another"
        ),
        "shifting": Program(
            "durations.shifting", "move or stretch a whole prompt in time"
        ),
        "attribution": Program(
            "durations.attribution", "attribute the answer to durations"
        ),
        "inverse": Program(
            "durations.inverse", "find durations that give another answer"
        ),
        "pruning": Program(
            "durations.pruning", "find the shortest prompt with the same answer"
        ),
    },
    "Studies of many prompts": {
        "study": Program("studies.study", "run the sweeps of a data set of prompts"),
        "analysis": Program(
            "studies.analysis", "compute tables and figures of stored studies"
        ),
        "report": Program(
            "studies.report", "run every experiment on one model, on one page"
        ),
    },
    "Continuous output on text": {
        "train_lm": Program("densities.train_lm", "train the softmax baseline"),
        "train_density": Program(
            "densities.train_density", "train a density over the next token's vector"
        ),
        "train_head": Program(
            "densities.train_head", "train a new head on a pretrained trunk"
        ),
        "train_autoencoder": Program(
            "calm.train_autoencoder", "train an autoencoder: several tokens to a vector"
        ),
        "train_calm": Program(
            "calm.train_calm", "train a next-vector model on an autoencoder"
        ),
        "sample_density": Program(
            "densities.sample_density", "sample and steer a density model"
        ),
        "sample_calm": Program("calm.sample_calm", "sample a next-vector model"),
        "evaluate": Program(
            "text_models.evaluate", "evaluate trained models on held-out text"
        ),
        "compare_quantizers": Program(
            "text_models.compare_quantizers", "compare the ways from vectors to tokens"
        ),
        "compare_heads": Program(
            "calm.compare_heads", "compare the heads of next-vector models"
        ),
    },
    "Recipes": {
        "recipe": Program(
            "recipes.recipe", "run the programs that make the tables, one by one"
        ),
    },
    "Continuous output on sound": {
        "frames": Program("audio.frames", "train density models of log-mel frames"),
    },
    "The bundled model": {
        "train_apples": Program(
            "apples.train_apples", "train the bundled model apples"
        ),
        "evaluate_apples": Program(
            "apples.evaluate_apples", "evaluate models of its kind"
        ),
    },
    "Speed and memory": {
        "benchmark": Program(
            "benchmarks.benchmark", "measure speed against other libraries"
        ),
        "device_costs": Program(
            "benchmarks.device_costs", "compute what large models need"
        ),
        "gpu_check": Program(
            "gpu.gpu_check", "check what this machine's GPU computes, and its speed"
        ),
        "vector_quantizers": Program(
            "benchmarks.vector_quantizers",
            "compare quantizers with vector-quantize-pytorch",
        ),
    },
}
PROGRAMS: Mapping[str, Program] = {
    name: program for programs in GROUPS.values() for name, program in programs.items()
}
