# SPDX-License-Identifier: Apache-2.0
"""Parameters of a library's functions and classes from its sources, without importing them, and whether a call fits.

A signature travels as text, `(lr: float=0.001, *, bias=True)`, without self and cls, so that a table of them can be
kept as JSON and read by a person. Followed are modules, classes and their parents, methods, dataclasses, re-exports
(also `import *`), instances of a class that are called, and names assigned to another."""

import ast
import inspect
from typing import Protocol

from tests.support.call_sites import CallSite


class Sources(Protocol):
    """Files of a package."""

    def tree(self, path: str) -> ast.Module: ...

    def has(self, path: str) -> bool: ...


def signature_text(sources: Sources, dotted: str) -> str | None:
    """Of `package.module.Class.method` or the like; None if the sources have no such thing."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        module = _module_file(sources, parts[:split])
        if module is not None:
            return _in_module(sources, parts[:split], parts[split:], seen=frozenset())
    return None


def _module_file(sources: Sources, parts: list[str]) -> str | None:
    base = "/".join(parts)
    for path in (f"{base}/__init__.pyi", f"{base}/__init__.py", f"{base}.pyi", f"{base}.py"):
        if sources.has(path):
            return path
    return None


def _in_module(
    sources: Sources, module: list[str], rest: list[str], *, seen: frozenset[str]
) -> str | None:
    path = _module_file(sources, module)
    key = f"{'.'.join(module)}:{'.'.join(rest)}"
    if path is None or not rest or key in seen:
        return None
    body = list(ast.walk(sources.tree(path)))
    name, *members = rest
    package = module if path.endswith(("__init__.py", "__init__.pyi")) else module[:-1]
    targets = _elsewhere(body, name, package=package, module=module)
    definitions = [
        n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name
    ]
    definitions.sort(key=lambda n: "overload" in map(ast.unparse, n.decorator_list))
    for node in definitions[:1]:
        found = _of_definition(node, members)
        if found is not None or isinstance(node, ast.FunctionDef):
            return found
        targets = [[*module, *ast.unparse(base).split(".")] for base in node.bases]  # inherited
    for target in targets:
        found = _follow(sources, [*target, *members], seen=seen | {key})
        if found is not None:
            return found
    return None


def _elsewhere(
    body: list[ast.AST], name: str, *, package: list[str], module: list[str]
) -> list[list[str]]:
    """Where a module takes a name from."""
    found = []
    for node in body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    found.append([*source, alias.name])
                elif alias.name == "*":
                    found.append([*source, name])
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            if isinstance(node.value, ast.Call):  # an instance, which is called
                found.append([*module, *ast.unparse(node.value.func).split("."), "__call__"])
            elif isinstance(node.value, ast.Name | ast.Attribute):
                found.append([*module, *ast.unparse(node.value).split(".")])
    return found


def _follow(sources: Sources, parts: list[str], *, seen: frozenset[str]) -> str | None:
    for split in range(len(parts), 0, -1):
        if _module_file(sources, parts[:split]) is not None:
            return _in_module(sources, parts[:split], parts[split:], seen=seen)
    return None


def _of_definition(node: ast.FunctionDef | ast.ClassDef, members: list[str]) -> str | None:
    if isinstance(node, ast.FunctionDef):
        return None if members else f"({ast.unparse(node.args)})"
    wanted = members[0] if members else "__init__"
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == wanted:
            text = _of_definition(method, [])
            is_static = any(ast.unparse(d) == "staticmethod" for d in method.decorator_list)
            return text if is_static or text is None else _without_first(text)
    is_data = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    if wanted != "__init__" or not is_data:
        return None
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    return f"({', '.join(ast.unparse(field) for field in fields)})"


def _without_first(text: str) -> str:
    arguments = _arguments(text)
    (arguments.posonlyargs or arguments.args).pop(0)
    return f"({ast.unparse(arguments)})"


def _arguments(text: str) -> ast.arguments:
    function = ast.parse(f"def f{text}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def misfit(site: CallSite, text: str) -> str | None:
    """Why a call does not fit a signature, in Python's own words; None if it does."""
    arguments = _arguments(text)
    kind = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    found = [
        kind(
            arg.arg,
            kind.POSITIONAL_ONLY if arg in arguments.posonlyargs else kind.POSITIONAL_OR_KEYWORD,
            default=kind.empty if index < required else None,
        )
        for index, arg in enumerate(positional)
    ]
    if arguments.vararg:
        found.append(kind(arguments.vararg.arg, kind.VAR_POSITIONAL))
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        value = kind.empty if default is None else None
        found.append(kind(arg.arg, kind.KEYWORD_ONLY, default=value))
    if arguments.kwarg:
        found.append(kind(arguments.kwarg.arg, kind.VAR_KEYWORD))
    signature = inspect.Signature(found)
    bind = signature.bind_partial if site.unknown or site.is_partial else signature.bind
    given = dict.fromkeys([*site.keywords, *site.spread])
    try:
        bind(*[None] * site.positional, **given)
    except TypeError as error:
        return str(error)
    return None
