"""The repository keeps the rules of `style`, and each rule catches an offence."""

import pytest

from tests import style
from tests.style import Density

MAX_CASTS = 5
# Folder -> at most so many nodes a line, at least so many letters a name. These may only improve.
RATCHETS = {
    "continuous_lm": Density(5.5, 7.3),
    "losses": Density(5.4, 9.3),
    "quantize": Density(5.4, 7.3),
    "models": Density(5.1, 7.8),
    "experiments": Density(5.25, 7.75),
}


def test_every_file_keeps_the_rules():
    faults = [
        fault
        for file in style.files(style.all_paths())
        for fault in style.faults_of(file)
    ]
    assert not faults, "\n".join(faults)


def test_casts_are_few():
    lines = [line for path, text in style.sources() for line in style.casts(path, text)]
    assert len(lines) <= MAX_CASTS, "\n".join(lines)


@pytest.mark.parametrize("folder", RATCHETS)
def test_code_is_not_denser_than_before(folder):
    measured = style.density([text for _, text in style.sources(folder)])
    limit = RATCHETS[folder]
    assert measured.nodes_per_line <= limit.nodes_per_line, measured
    assert measured.mean_name_length >= limit.mean_name_length, measured


LONG = "word " * 31
# Rule -> offences, each of which it finds once, and text that it lets pass.
PLANTED = {
    style.banned_names: (
        ["found = 1", "def told(): pass", "for _kept in x: pass", "def f(given): pass"],
        "num_found = 1\nx.found\nf(given=1)",
    ),
    style.standard_module_names: (
        [
            "import continuous_lm.durations as time",
            "from continuous_lm import durations as time",
        ],
        "import time\nfrom continuous_lm import durations",
    ),
    style.docstring_openings: (
        [
            '"""What the head reads."""',
            'def f():\n    """Of the vector."""',
            '"""Whether it is."""',
        ],
        '"""Return whether it is."""\ndef f():\n    """Whatever."""',
    ),
    style.long_sentences: (
        [
            f'"""{LONG}."""',
            f"# {LONG}",
            f"# {LONG[:80]}\n# {LONG[80:]}",
            f"raise E('{LONG}')",
        ],
        f'"""{LONG[:70]}. {LONG[:70].capitalize()}.\n\n{LONG[:70]}"""',
    ),
    style.banned_phrases: (
        [
            "# made anew",
            '"""Return what is left."""',
            "raise E('it is said')",
            "f(help='Goes on.')",
        ],
        "# made again\nanew = 1",
    ),
    style.entries_without_noun: (
        ['"""Add.\\n\\nArgs:\\n  seed: of the data.\\n"""'],
        '"""Add.\\n\\nArgs:\\n  seed: seed of the data.\\n\\nSaid: of old.\\n"""',
    ),
    style.unlisted_axes: (
        ["x = 1  # [B, Y]", '"""Return y [..., O]."""'],
        "x = 1  # [B, T, 2]\ny = x[Y]  # x[Y], [num_panels, B]",
    ),
    style.short_helps: (
        ["flag(1, help='Of it.')", "flag(1, help='Steps.')"],
        "flag(1, help='Number of steps.')",
    ),
    style.with_kwargs: (
        ["def f(**options): pass", "class A:\n    def __call__(self, **options): pass"],
        "def _f(**options): pass\ndef g():\n    def f(**options): pass",
    ),
    style.with_any_result: (["def f() -> Any: pass"], "def _f() -> Any: pass"),
    style.with_method_names: (
        ["model.apply({}, 1, method='loss')"],
        "model.apply({}, 1)",
    ),
    style.casts: (["cast(int, x)", "typing.cast(int, x)"], "x.cast(int)"),
}


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_planted_offences_are_found(rule):
    offences, innocent = PLANTED[rule]
    for offence in offences:
        assert len(rule("a.py", offence)) == 1, offence
    assert not rule("a.py", innocent)


def test_every_rule_has_planted_offences():
    assert {*style.CODE_RULES, *style.SOURCE_RULES} <= PLANTED.keys()


def test_prose_of_markdown_is_checked():
    code = f"```\n{LONG}\n```\n| {LONG} |\n\n- short\n- {LONG[:70]}\n"
    assert not style.long_sentences("a.md", code)
    assert len(style.long_sentences("a.md", f"{code}\n{LONG}\nand more.\n")) == 1


def test_density_counts_code_alone():
    two_lines = '"""Says."""\n# a\nlonger = 1\nx = f(2)\n'
    assert style.density([two_lines]) == Density(11 / 2, 3.5)
