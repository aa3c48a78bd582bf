"""Griffe extension of the API pages: docstrings as the Markdown that mkdocstrings expects.

- Comments document attributes: the comment behind a field or constant, or the lines above it.
- The fields of a class are one list, with those that its docstring describes.
- Doctests become code blocks, shapes such as [..., T] become code, and the aligned tables of
  module docstrings become lists.
- Of the special methods only `__call__` is shown.
"""

import functools
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator

import griffe

SHAPE = re.compile(
    r"(?<![\w`\]\)\[])\[(?:\*?[A-Z]\b|\.\.\.|\d+)[^\[\]`\n]{0,40}\](?!\(|\[|`)"
)
TABLE_ROW = re.compile(r"^(?: {2})?(\w[\w., ]*?) {2,}(\S.*)$")
TABLE_HEAD = re.compile(r"^[A-Z][^.]*:$")
NO_PROSE = ("noqa", "type:", "---", "ruff:", "pragma")


class ApiExtension(griffe.Extension):
    """Prepares the whole package after griffe has read it."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Change all objects of the package."""
        for object_ in walk(pkg):
            if object_.is_attribute and object_.docstring is None:
                document_by_comment(object_)
            if object_.docstring is not None:
                text = object_.docstring.value
                object_.docstring.value = to_markdown(text, object_.is_module)
        for object_ in walk(pkg):
            if object_.is_class:
                list_fields(object_)


def walk(object_: griffe.Object) -> Iterator[griffe.Object]:
    """Return an object and everything that is defined in it."""
    yield object_
    for member in object_.members.values():
        if not member.is_alias:
            yield from walk(member)


# --- Attributes -------------------------------------------------------------------------------


@functools.cache
def comments_of(path: pathlib.Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return the comments behind code and those on lines of their own, by line."""
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        text = token.string.lstrip("#: ")
        if token.type == tokenize.COMMENT and not text.startswith(NO_PROSE):
            is_alone = token.line.lstrip().startswith("#")
            (alone if is_alone else behind)[token.start[0]] = text
    return behind, alone


def document_by_comment(attribute: griffe.Object) -> None:
    """Make the comment of an attribute its docstring."""
    if attribute.lineno is None or attribute.endlineno is None:
        return
    behind, alone = comments_of(attribute.filepath)
    text = behind.get(attribute.endlineno, "")
    if not text:
        line = attribute.lineno - 1
        while line in alone:
            text = f"{alone[line]} {text}"
            line -= 1
    if text := text.strip():
        sentence = text[0].upper() + text[1:] if text[:2].islower() else text
        attribute.docstring = griffe.Docstring(sentence, parent=attribute)


def list_fields(class_: griffe.Class) -> None:
    """Show the fields of a class as one list, without an entry for each; hide special methods."""
    for name, member in class_.members.items():
        if name.startswith("__") and name not in ("__call__", "__init__"):
            member.public = False
    fields = [
        member
        for name, member in class_.members.items()
        if not name.startswith("_") and member.is_attribute and not member.is_alias
        if member.annotation is not None and "property" not in member.labels
    ]
    if not fields:
        return
    docstring = class_.docstring or griffe.Docstring("", parent=class_, parser="google")
    sections = list(docstring.parsed)
    kind = griffe.DocstringSectionKind.attributes
    section = next((section for section in sections if section.kind is kind), None)
    if section is None:
        section = griffe.DocstringSectionAttributes([])
        sections.insert(1, section)
    listed = {attribute.name for attribute in section.value}
    for field in fields:
        field.public = False
        if field.name not in listed:
            text = field.docstring.value if field.docstring else ""
            entry = griffe.DocstringAttribute(
                field.name, annotation=field.annotation, description=text
            )
            section.value.append(entry)
    docstring.parsed = sections
    class_.docstring = docstring


# --- Text -------------------------------------------------------------------------------------


def to_markdown(text: str, is_module: bool) -> str:
    """Return a docstring as Markdown."""
    if is_module:
        text = tables_as_lists(text)
    lines = doctests_as_blocks(text.splitlines())
    is_code = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        follows_blank = number > 0 and not lines[number - 1].strip()
        if line.strip().startswith("```"):
            is_code = not is_code
        elif not (is_code or (follows_blank and indent >= 4)):
            lines[number] = SHAPE.sub(r"`\g<0>`", line)
    return "\n".join(lines)


def doctests_as_blocks(lines: list[str]) -> list[str]:
    """Return the lines with a fence around each doctest."""
    result: list[str] = []
    fence = ""
    for line in [*lines, ""]:
        bare = line.strip()
        if bare.startswith(">>>") and not fence:
            if result and result[-1].strip():
                result.append("")
            fence = line[: len(line) - len(line.lstrip())] + "```"
            result.append(f"{fence}pycon")
        elif fence and not bare:
            result.append(fence)
            fence = ""
        result.append(line)
    return result[:-1]


def tables_as_lists(text: str) -> str:
    """Return the text with aligned rows as list items under bold headings."""
    lines = text.splitlines()
    result: list[str] = []
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if row := TABLE_ROW.match(line):
            names = ", ".join(f"`{name}`" for name in row[1].split(", "))
            if result and result[-1] and not result[-1].startswith("- "):
                result.append("")
            result.append(f"- {names}: {row[2]}")
        elif TABLE_HEAD.match(line) and TABLE_ROW.match(following):
            result += [f"**{line}**", ""]
        else:
            result.append(line)
    return "\n".join(result)
