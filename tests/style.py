"""Rules for names and prose. Run on files or folders:

    python -m tests.style [PATH ...]

Each rule takes a file's path and text and returns one line per offence. `test_style.py` runs all
rules on the whole repository.
"""

import ast
import functools
import io
import pathlib
import re
import statistics
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from continuous_lm.axes import LETTERS

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("continuous_lm", "losses", "quantize", "models", "experiments", "tests")
MAX_SENTENCE_WORDS = 30
MIN_HELP_WORDS = 3

# Participles and fillers that do not name the contents of a variable.
BANNED_NAMES = frozenset(
    "told made found given asked own said wanted kept heard chosen drawn taken known whole rest"
    " seen gone worth judged spoken thing things stuff nothing nobody".split()
)
# A docstring starts with a noun or a verb.
BANNED_OPENINGS = frozenset(
    "what whether of those which how where that whose who as by in it its they them here there"
    " so if when".split()
)
# Pattern -> replacement. Archaisms, agentless telling, and inversions of this project's past.
BANNED_PHRASES = {
    r"\banew\b": "again",
    r"\bwhom\b": "a sentence without it",
    r"\bupon\b": "on",
    r"\blest\b": "so that ... not",
    r"\b(?:is|are|was|were|be) (?:said|told|asked for|wanted|spoken of)\b": "an active verb",
    r"\bas of `": "as in `",
    r"\bnothing but\b": "only",
    r"\bgo(?:es)? on\b": "continue or resume",
    r"\b(?:of|for|to|than|with|by|from|on|at|in) what\b": "a noun",
    r"\bwhat (?:is|are|was|were|has|had|can|does|did|it|they|the|a|an|no|none|one)\b": "a noun",
    r"\bsays? (?:what|which|how|whether|so|it)\b": "a verb of the field",
    r"\bone after the other\b": "in turn, or sequentially",
    r"\bof which none\b": "none of which",
    r"\bthe likes? of\b": "such as",
}
ANY_BANNED_PHRASE = re.compile("|".join(BANNED_PHRASES), re.IGNORECASE)
# A contract of arrays by their names needs keywords; each is an (array, axes) of its own.
ALLOWED_KWARGS = {"continuous_lm/arguments.py: check"}
MODULE_ALIASES = re.compile(
    r"^import \S+ as time$|^from \S+ import \S+ as time$", re.MULTILINE
)


class Density(NamedTuple):
    """Amount of code in a line, in a folder."""

    nodes_per_line: (
        float  # nodes of the syntax tree; docstrings and comments are no lines
    )
    mean_name_length: float  # letters of names that are assigned


class Prose(NamedTuple):
    """A piece of text for readers."""

    line: int
    text: str


@functools.cache
def nodes(source: str) -> Sequence[ast.AST]:
    """All nodes of a file's syntax tree."""
    return tuple(ast.walk(ast.parse(source)))


def docstrings(source: str) -> Iterator[Prose]:
    """The docstrings of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in nodes(source):
        if isinstance(node, kinds):
            text = ast.get_docstring(node)
            if text:
                yield Prose(node.body[0].lineno, text)


@functools.cache
def comments(source: str) -> list[Prose]:
    """Comments; consecutive full-line comments are one piece."""
    return list(_comments(source))


def _comments(source: str) -> Iterator[Prose]:
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        text = token.string.lstrip("#!: ")
        is_full_line = token.line.lstrip().startswith("#")
        if block and not (is_full_line and line == last + 1):
            yield Prose(first, "\n".join(block))
            block = []
        if not block:
            first = line
        block.append(text)
        last = line if is_full_line else -1
    if block:
        yield Prose(first, "\n".join(block))


def messages(source: str) -> Iterator[Prose]:
    """The text of raised exceptions and of flag helps."""
    for node in nodes(source):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from (Prose(node.lineno, text) for text in _strings(node.exc.args))
        if isinstance(node, ast.Call):
            helps = [
                keyword.value for keyword in node.keywords if keyword.arg == "help"
            ]
            yield from (Prose(node.lineno, text) for text in _strings(helps))


def _strings(nodes: Sequence[ast.AST]) -> list[str]:
    """Literal text of strings and f-strings; a replaced field reads as X."""
    texts = []
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (
                part.value if isinstance(part, ast.Constant) else "X"
                for part in node.values
            )
            texts.append("".join(str(part) for part in parts))
    return texts


def markdown_prose(text: str) -> Iterator[Prose]:
    """Paragraphs and list items, without code, tables, headings and link targets."""
    text = re.sub(
        r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S
    )
    lines: list[str] = []
    first = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        is_break = not line.strip() or re.match(r"\s*(#|\||!\[|<|    |-{3}|:::)", line)
        starts_item = re.match(r"\s*([-*]|\d+\.|\?\?\?|!!!) ", line)
        if (is_break or starts_item) and lines:
            yield Prose(first, re.sub(r"\]\([^)]*\)", "]", "\n".join(lines)))
            lines = []
        if not is_break:
            first = number if not lines else first
            lines.append(re.sub(r"^\s*([-*]|\d+\.) ", "", line))


def sentences(prose: Prose) -> Iterator[Prose]:
    """Sentences of running text. Doctests, formulas, and entries of Args are apart."""
    pattern = re.compile(r"(?<=[.!?])[\"')\]*`]*\s+(?=[\"'(\[*`]*[A-Z0-9`]|\")")
    paragraph: list[str] = []
    first = prose.line
    indent = 0
    lines = [*prose.text.splitlines(), ""]
    for offset, line in enumerate(lines):
        bare = line.strip()
        starts_entry = re.match(
            r"(\*{0,2}[\w.`, -]{1,60}:( |$)|\S+ {3,}\S|[-*] |>>>|\.\.\. |\|)", bare
        )
        width = len(line) - len(line.lstrip())
        is_formula = width >= 4 and width > indent and not paragraph
        if (not bare or starts_entry or is_formula) and paragraph:
            yield from (
                Prose(first, part) for part in pattern.split(" ".join(paragraph))
            )
            paragraph = []
        if not bare or bare.startswith((">>>", "...", "|")) or is_formula:
            continue
        if not paragraph:
            first = prose.line + offset
            indent = width
        paragraph.append(bare)


# --- Rules ------------------------------------------------------------------------------------


def banned_names(path: str, source: str) -> list[str]:
    """Names that do not tell their contents: told, made, found, given, ..."""
    faults = []
    for node in nodes(source):
        names: list[str] = []
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.arg):
            names = [node.arg]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        faults += [
            f"{path}:{node.lineno}: name {name!r} does not tell what it holds"
            for name in names
            if name.strip("_").lower() in BANNED_NAMES
        ]
    return faults


def standard_module_names(path: str, source: str) -> list[str]:
    """Another module imported under the name `time`."""
    return [
        f"{path}: {match[0]!r} hides the standard module"
        for match in MODULE_ALIASES.finditer(source)
    ]


def docstring_openings(path: str, source: str) -> list[str]:
    """Docstrings that do not start with a noun or a verb."""
    return [
        f"{path}:{prose.line}: docstring starts with {word!r}"
        for prose in docstrings(source)
        if (word := re.match(r"\W*(\w*)", prose.text)[1]).lower() in BANNED_OPENINGS
    ]


@functools.cache
def all_prose(path: str, source: str) -> list[Prose]:
    """Everything in a file that people read."""
    if path.endswith(".md"):
        return list(markdown_prose(source))
    return [*docstrings(source), *comments(source), *messages(source)]


def long_sentences(path: str, source: str) -> list[str]:
    """Sentences of more than MAX_SENTENCE_WORDS words."""
    return [
        f"{path}:{sentence.line}: {count} words: {sentence.text[:60]}..."
        for prose in all_prose(path, source)
        for sentence in sentences(prose)
        if (count := len(re.findall(r"[^\W\d_][\w'-]*", sentence.text)))
        > MAX_SENTENCE_WORDS
    ]


def banned_phrases(path: str, source: str) -> list[str]:
    """Archaisms and riddles."""
    return [
        f"{path}:{prose.line}: {match[0]!r}: write {replacement}"
        for prose in all_prose(path, source)
        for text in [re.sub(r"\s+", " ", prose.text)]
        if ANY_BANNED_PHRASE.search(text)
        for pattern, replacement in BANNED_PHRASES.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]


def entries_without_noun(path: str, source: str) -> list[str]:
    """Entries of Args and Attributes that start with "of"."""
    entry = re.compile(r"^[ \t]+(\w+): [Oo]f \w", re.MULTILINE)
    return [
        f"{path}:{prose.line}: {match[1]!r} has no noun: write NAME: NOUN of ..."
        for prose in docstrings(source)
        for match in entry.finditer(prose.text)
    ]


def unlisted_axes(path: str, source: str) -> list[str]:
    """Axis letters in shapes such as [B, T, D] that `continuous_lm.axes` does not list."""
    shape = re.compile(
        r"(?<![\w\])`\"'])\[((?:\*?[A-Z]|\.\.\.|\d+)(?:, (?:\*?[A-Z]|\.\.\.|\d+))*)\]"
    )
    return [
        f"{path}:{prose.line}: axis {letter!r} is not in axes.LETTERS"
        for prose in [*docstrings(source), *comments(source)]
        for match in shape.finditer(prose.text)
        for letter in re.findall("[A-Z]", match[1])
        if letter not in LETTERS
    ]


def short_helps(path: str, source: str) -> list[str]:
    """Helps of flags under MIN_HELP_WORDS words."""
    return [
        f"{path}:{node.lineno}: help {text!r} does not stand alone"
        for node in nodes(source)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "help"
        for text in _strings([keyword.value])
        if len(text.split()) < MIN_HELP_WORDS
    ]


# --- Signatures -------------------------------------------------------------------------------


def public_functions(source: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions of a module and methods of its classes, with their names from the module's."""
    for node in ast.iter_child_nodes(nodes(source)[0]):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and _is_public(method.name):
                    yield f"{node.name}.{method.name}", method


def _is_public(method: str) -> bool:
    return not method.startswith("_") or method == "__call__"


def with_kwargs(path: str, source: str) -> list[str]:
    """Public functions that take any keywords."""
    functions = public_functions(source)
    names = [f"{path}: {name}" for name, function in functions if function.args.kwarg]
    return [name for name in names if name not in ALLOWED_KWARGS]


def with_any_result(path: str, source: str) -> list[str]:
    """Public functions whose result has no type: -> Any."""
    return [
        f"{path}: {name}"
        for name, function in public_functions(source)
        if function.returns is not None and ast.unparse(function.returns) == "Any"
    ]


def with_method_names(path: str, source: str) -> list[str]:
    """Calls of a Linen module's method by its name: model.apply(..., method="loss")."""
    return [
        f"{path}:{node.lineno}"
        for node in nodes(source)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("apply", "init", "init_with_output")
        and any(keyword.arg == "method" for keyword in node.keywords)
    ]


def casts(path: str, source: str) -> list[str]:
    """Calls of typing.cast."""
    return [
        f"{path}:{node.lineno}"
        for node in nodes(source)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("cast", "typing.cast")
    ]


def density(texts: list[str]) -> Density:
    """Measure these sources together."""
    num_nodes = 0
    num_lines = 0
    name_lengths = []
    for text in texts:
        docstring_lines: set[int] = set()
        for node in nodes(text):
            num_nodes += not isinstance(node, ast.Load | ast.Store | ast.Del)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name_lengths.append(len(node.id))
            if _has_docstring(node):
                first = node.body[0]
                docstring_lines |= set(range(first.lineno, first.end_lineno + 1))
        for number, line in enumerate(text.splitlines(), 1):
            is_code = line.strip() and not line.strip().startswith("#")
            num_lines += bool(is_code and number not in docstring_lines)
    return Density(num_nodes / num_lines, statistics.mean(name_lengths))


def _has_docstring(node: ast.AST) -> bool:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    return isinstance(node, kinds) and ast.get_docstring(node) is not None


Rule = Callable[[str, str], list[str]]
SOURCE_RULES: Sequence[Rule] = (
    with_kwargs,
    with_any_result,
    with_method_names,
)  # not in tests
CODE_RULES: Sequence[Rule] = (
    banned_names,
    standard_module_names,
    docstring_openings,
    long_sentences,
    banned_phrases,
    entries_without_noun,
    unlisted_axes,
    short_helps,
)
MARKDOWN_RULES: Sequence[Rule] = (long_sentences, banned_phrases)
UNCHECKED = ("CHANGELOG.md",)  # cites old names


def files(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The Python and Markdown files of these paths; links are not followed."""
    result: list[pathlib.Path] = []
    for path in paths:
        candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
        result += [
            file
            for file in candidates
            if file.suffix in (".py", ".md")
            and not any(part.is_symlink() for part in [file, *file.parents])
            and file.name not in UNCHECKED
        ]
    return result


def faults_of(file: pathlib.Path) -> list[str]:
    """The offences of one file against all rules."""
    path = file.resolve().relative_to(ROOT).as_posix()
    rules = MARKDOWN_RULES if file.suffix == ".md" else CODE_RULES
    if file.suffix == ".py" and not path.startswith(("tests/", "docs/")):
        rules = [*rules, *SOURCE_RULES]
    text = file.read_text()
    return [fault for rule in rules for fault in rule(path, text)]


def all_paths() -> list[pathlib.Path]:
    """The folders and files that the rules hold for."""
    return [ROOT / name for name in (*FOLDERS, "docs")] + sorted(ROOT.glob("*.md"))


def sources(folder: str | None = None) -> list[tuple[str, str]]:
    """Path from the root and text of each Python file of a folder, or of all but tests."""
    folders = [folder] if folder else [name for name in FOLDERS if name != "tests"]
    return [
        (file.relative_to(ROOT).as_posix(), file.read_text())
        for file in files([ROOT / name for name in folders])
        if file.suffix == ".py"
    ]


def main(arguments: Sequence[str]) -> int:
    """Print the offences in these paths, or in the whole repository."""
    paths = [ROOT / name for name in arguments] or all_paths()
    faults = [fault for file in files(paths) for fault in faults_of(file)]
    print("\n".join(faults))
    print(f"{len(faults)} offences")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
