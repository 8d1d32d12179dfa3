# SPDX-License-Identifier: Apache-2.0
"""Every call of a library in a Python file, by its syntax tree: found under whatever name it was imported.

Followed are imports with and without `as`, of packages, modules and names, also inside functions and `try`; names that
are assigned such a name (`adam = FusedAdam`), and `__wrapped__`; `functools.partial`; classes that inherit, with their
`super().method(...)`. Options spread by `**name` are those of the dicts written in the same function, or at the top of
the file: displays, `dict(...)`, `name["key"] = ...`, `name.update(...)`; of anything else `unknown` says its text.
Values that a call returned are not followed."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CallSite:
    """One call, with what is written at it."""

    path: str
    line: int
    callee: str  # dotted: transformer_engine.pytorch.Linear, Linear.forward for a super() call
    positional: int
    keywords: tuple[str, ...]
    spread: tuple[str, ...] = ()  # keywords that a ** may bring
    unknown: tuple[str, ...] = ()  # * and **, or parts of them, that the file does not spell out
    is_partial: bool = False

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.callee}"


def call_sites(text: str, *, path: str, library: str) -> list[CallSite]:
    """Those of names below `library`, e.g. transformer_engine, in the order of the file's syntax tree."""
    return list(_File(ast.parse(text), path=path, library=library).calls())


class _File:
    def __init__(self, tree: ast.Module, *, path: str, library: str) -> None:
        self._tree, self._path, self._library = tree, path, library
        self._names: dict[str, set[str]] = defaultdict(set)
        self._function: dict[ast.AST, ast.AST] = {}  # the innermost one that holds a node
        for function in ast.walk(tree):  # outer ones come first
            if isinstance(function, ast.FunctionDef | ast.Module):
                self._function |= dict.fromkeys(ast.walk(function), function)
        self._dicts: dict[tuple[ast.AST, str], list[ast.expr]] = defaultdict(list)
        for node in ast.walk(tree):
            self._take_import(node)
            self._take_dict(node, self._function[node])
        for _ in range(3):  # a name of a name of a name
            for node in ast.walk(tree):
                self._take_assignment(node)

    def calls(self) -> Iterator[CallSite]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call):
                yield from self._direct(node)
            elif isinstance(node, ast.ClassDef):
                yield from self._of_parents(node)

    def _direct(self, node: ast.Call) -> Iterator[CallSite]:
        if ast.unparse(node.func) in ("partial", "functools.partial") and node.args:
            for callee in self._meant(node.args[0]):
                yield self._site(node, callee, arguments=node.args[1:], is_partial=True)
            return
        for callee in self._meant(node.func):
            yield self._site(node, callee, arguments=node.args)

    def _of_parents(self, node: ast.ClassDef) -> Iterator[CallSite]:
        parents = sorted({meant for base in node.bases for meant in self._meant(base)})
        for call in ast.walk(node):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            if ast.unparse(call.func.value).startswith("super("):
                for parent in parents:
                    yield self._site(call, f"{parent}.{call.func.attr}", arguments=call.args)

    def _site(
        self, node: ast.Call, callee: str, *, arguments: list[ast.expr], is_partial: bool = False
    ) -> CallSite:
        spread: set[str] = set()
        unknown = [ast.unparse(a) for a in arguments if isinstance(a, ast.Starred)]
        for keyword in node.keywords:
            if keyword.arg is None:
                known, rest = self._keys_of(keyword.value, self._function[node])
                spread |= known
                unknown += [f"**{text}" for text in sorted(rest)]
        return CallSite(
            path=self._path,
            line=node.lineno,
            callee=callee,
            positional=sum(not isinstance(a, ast.Starred) for a in arguments),
            keywords=tuple(k.arg for k in node.keywords if k.arg is not None),
            spread=tuple(sorted(spread)),
            unknown=tuple(unknown),
            is_partial=is_partial,
        )

    def _meant(self, node: ast.expr) -> list[str]:
        """Dotted names below the library that an expression may be."""
        first, dot, rest = ast.unparse(node).partition(".")
        whole = {f"{name}{dot}{rest}".removesuffix(".__wrapped__") for name in self._names[first]}
        return sorted(name for name in whole if name.startswith(f"{self._library}."))

    def _take_import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                self._names[alias.asname or top].add(alias.name if alias.asname else top)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                self._names[alias.asname or alias.name].add(f"{node.module}.{alias.name}")

    def _take_assignment(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self._names[target.id] |= set(self._meant(node.value))

    def _take_dict(self, node: ast.AST, function: ast.AST) -> None:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    self._dicts[function, target.id].append(node.value)
                elif isinstance(target, ast.Subscript):
                    one = ast.Dict(keys=[target.slice], values=[node.value])
                    self._dicts[function, ast.unparse(target.value)].append(one)
        elif isinstance(node, ast.Call) and len(node.args) == 1:
            holder, dot, method = ast.unparse(node.func).rpartition(".")
            if dot and method == "update":
                self._dicts[function, holder].append(node.args[0])

    def _keys_of(self, node: ast.expr, function: ast.AST) -> tuple[set[str], set[str]]:
        """Keys of a dict that the file spells out, and the text of what it does not."""
        parts: list[ast.expr] = []
        if isinstance(node, ast.Dict):
            keys = [k.value if isinstance(k, ast.Constant) else None for k in node.keys]
            rest = {ast.unparse(node)} if None in keys else set()
            return {str(key) for key in keys if key is not None}, rest
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
            return {k.arg for k in node.keywords if k.arg}, set()
        if isinstance(node, ast.IfExp):
            parts = [node.body, node.orelse]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Name):
            parts = self._dicts[function, node.id] or self._dicts[self._tree, node.id]
        found = [self._keys_of(part, function) for part in parts]
        unknown = set() if found else {ast.unparse(node)}
        return set().union(*(k for k, _ in found)), unknown.union(*(rest for _, rest in found))
