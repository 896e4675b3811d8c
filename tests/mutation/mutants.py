"""Every small mistake that can be made in a source text: a sign, a border, a term, an argument."""

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_CALCULATED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
# Functions and methods that are easily taken for each other.
_CALLED = {
    **{"min": "max", "max": "min", "any": "all", "all": "any", "argmin": "argmax"},
    **{"argmax": "argmin", "minimum": "maximum", "maximum": "minimum", "floor": "ceil"},
    **{"ceil": "floor", "sum": "mean", "mean": "sum", "zeros": "ones", "ones": "zeros"},
    **{"sorted": "list", "sqrt": "square", "log": "exp", "exp": "log", "add": "discard"},
    **{"startswith": "endswith", "endswith": "startswith", "union": "intersection"},
    **{"reduce_sum": "reduce_mean", "reduce_mean": "reduce_sum"},
}
# The order of two arguments is the same to them.
_SYMMETRIC = {"min", "max", "minimum", "maximum", "equal", "logical_and", "logical_or", "gcd"}
# Calls that tell a person something, and decide no number and no row.
_TOLD = {"say", "print", "doing", "long", "started", "advance", "log", "warn", "info", "debug"}


@dataclass(frozen=True)
class Mutant:
    """One mistake: the text between two offsets replaced."""

    where: str  # qualified name of the function, "" in the module
    line: int
    start: int  # offset in the source, in bytes of UTF-8
    stop: int
    old: str
    new: str
    occurrence: int = 0  # of the same mistake in the same function

    @property
    def name(self) -> str:
        """What stays the same when the code around it changes."""
        again = f" #{self.occurrence + 1}" if self.occurrence else ""
        return f"{self.where or '<module>'}: {_short(self.old)} -> {_short(self.new)}{again}"

    def applied(self, source: str) -> str:
        """The source text with this mistake in it."""
        encoded = source.encode()
        new = self.new if self.new == "pass" else f"({self.new})"
        return (encoded[: self.start] + new.encode() + encoded[self.stop :]).decode()


def mutants(source: str) -> list[Mutant]:
    """All mistakes that this module makes in `source`, in the order of the text.

    >>> for mutant in mutants("def share(n, of):\\n    return n / of if of > 0 else 1.0\\n"):
    ...     print(mutant.name)
    share: n / of if of > 0 else 1.0 -> 1.0 if of > 0 else n / of
    share: n / of -> n * of
    share: n / of -> n
    share: of > 0 -> of >= 0
    share: 0 -> 1
    share: 1.0 -> 1.5
    """
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    seen: Counter[str] = Counter()
    result = []
    for mutant in sorted(finder.found, key=lambda each: each.start):
        result.append(
            Mutant(
                *(mutant.where, mutant.line, mutant.start, mutant.stop, mutant.old, mutant.new),
                occurrence=seen[mutant.name],
            )
        )
        seen[mutant.name] += 1
    return result


def sample(found: list[Mutant], count: int, *, seed: int) -> list[Mutant]:
    """`count` of the mutants, chosen by their names: other code around them changes no choice."""

    def rank(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed} {mutant.name}".encode()).hexdigest()

    return sorted(sorted(found, key=rank)[:count], key=lambda each: each.start)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 90 else line[:70] + " … " + line[-17:]


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.found: list[Mutant] = []
        self._source = source.encode()
        self._starts = [0]
        for line in self._source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []

    def _offset(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def _replace(self, node: ast.expr | ast.stmt, new: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._offset(node.lineno, node.col_offset)
        stop = self._offset(node.end_lineno, node.end_col_offset)
        old = self._source[start:stop].decode()
        self.found.append(Mutant(".".join(self._scope), node.lineno, start, stop, old, new))

    def _swap(self, node: ast.expr, new: ast.expr) -> None:
        self._replace(node, ast.unparse(new))

    # What is looked into

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._scope.append(node.name)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self._scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        """An assertion can only fail where the code is wrong already."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Texts are held by other tests."""

    # Mistakes

    def visit_Raise(self, node: ast.Raise) -> None:
        if node.exc is not None:
            self._replace(node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and _called(node.value) not in _TOLD:
            self._replace(node, "pass")
            self.visit(node.value)
        elif not isinstance(node.value, ast.Call | ast.Constant):
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace(node, "pass")
        self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self._swap(node.test, ast.UnaryOp(ast.Not(), node.test))
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._swap(node, ast.IfExp(node.test, node.orelse, node.body))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, operator in enumerate(node.ops):
            operators = [*node.ops[:i], _COMPARED[type(operator)](), *node.ops[i + 1 :]]
            self._swap(node, ast.Compare(node.left, operators, node.comparators))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        text = any(
            isinstance(side, ast.JoinedStr)
            or (isinstance(side, ast.Constant) and isinstance(side.value, str))
            for side in (node.left, node.right)
        )
        other = _CALCULATED.get(type(node.op))
        if other is not None and not text:
            self._swap(node, ast.BinOp(node.left, other(), node.right))
            if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
                self._swap(node, node.left)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._swap(node, node.operand)
        if not isinstance(node.operand, ast.Constant):
            self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._swap(node, ast.BoolOp(other, node.values))
        for i in range(len(node.values)):
            rest = [*node.values[:i], *node.values[i + 1 :]]
            self._swap(node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(node, str(not node.value))
        elif isinstance(node.value, int):
            # One more of a thousand is no mistake.
            self._replace(node, str(node.value + 1 if node.value < 100 else 2 * node.value))
        elif isinstance(node.value, float):
            self._replace(node, repr(1.5 * node.value or 0.5))

    def visit_Call(self, node: ast.Call) -> None:
        name = _called(node)
        if name in _TOLD or name in ("Field", "TypeVar", "lru_cache", "field"):
            return
        if name in _CALLED:
            new = _CALLED[name]
            function = (
                ast.Name(new)
                if isinstance(node.func, ast.Name)
                else ast.Attribute(node.func.value, new)
                if isinstance(node.func, ast.Attribute)
                else node.func
            )
            self._swap(node, ast.Call(function, node.args, node.keywords))
        starred = any(isinstance(each, ast.Starred) for each in node.args)
        if len(node.args) == 2 and not starred and name not in _SYMMETRIC:
            self._swap(node, ast.Call(node.func, node.args[::-1], node.keywords))
        for i, keyword in enumerate(node.keywords):
            # `strict` asserts of two lists what is so already.
            if keyword.arg not in (None, "strict"):
                rest = [*node.keywords[:i], *node.keywords[i + 1 :]]
                self._swap(node, ast.Call(node.func, node.args, rest))
        for each in [node.func, *node.args, *(k.value for k in node.keywords if k.arg != "strict")]:
            self.visit(each)


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def changed(source: str, found: list[Mutant]) -> Iterator[tuple[Mutant, str]]:
    """Each mutant that is Python and not the same program, with its source text."""
    same = ast.dump(ast.parse(source))
    for mutant in found:
        text = mutant.applied(source)
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        if ast.dump(tree) != same:
            yield mutant, text
