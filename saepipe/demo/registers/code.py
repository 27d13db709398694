"""Python-like source code: every name that is used was defined before, in the same scope."""

from __future__ import annotations

from saepipe.demo.grammar import Writer

NOUNS = (
    "item user count total value name list data index result node key path line word text file order price score "
    "row table cell image point edge queue stack buffer token label batch layer weight size width height step limit "
    "offset message event time date rate cache page record field tree graph sample mean error"
).split()
VERBS = (
    "get set load save read write find count sort filter merge split update remove insert parse format check compute "
    "build create send fetch clean copy convert validate print reset apply collect"
).split()
TYPES = ("int", "str", "float", "list", "dict", "bool")
MODULES = ("os", "sys", "json", "math", "random", "time", "re", "csv", "logging", "itertools")
METHODS = ("append", "extend", "remove", "pop", "index", "count", "update", "get", "split", "strip", "join", "sort")
BUILTINS = ("len", "sum", "max", "min", "sorted", "abs", "int", "str", "list", "set", "range")
EXCEPTIONS = ("ValueError", "KeyError", "TypeError", "IndexError", "OSError")
STRINGS = (
    "hello", "utf-8", "name", "error", "done", "invalid input", "not found", "data.csv", "output.txt", "yes", "no",
    "config.json", "key", "total", "empty list", "start", "finished", "id",
)  # fmt: skip
COMMENTS = (
    "TODO: handle the empty case", "skip the header", "this is slow but simple", "see the tests", "in seconds",
    "avoid division by zero", "sorted by key", "cached for speed", "only the first one", "update in place",
    "fall back to the default", "check the bounds",
)  # fmt: skip
SUMMARIES = ("Return the {0} of the {1}.", "Compute {0} for each {1}.", "Read a {1} and its {0}.", "Update the {0}.")
COMPARISONS = ("==", "!=", "<", ">", "<=", ">=")
OPERATORS = ("+", "-", "*", "//", "%")


class _Block:
    """Writes statements at one indentation; knows the names that may be used there."""

    def __init__(self, writer: Writer, names: list[str], indent: int) -> None:
        self.writer = writer
        self.names = names
        self.indent = indent

    def start(self) -> None:
        if self.indent:
            self.writer.add("    " * self.indent, "code:indent")

    def keyword(self, word: str) -> None:
        self.writer.add(word, "code:keyword")

    def operator(self, symbol: str) -> None:
        self.writer.add(" ")
        self.writer.add(symbol, "code:operator")
        self.writer.add(" ")

    def name(self) -> None:
        self.writer.add(self.writer.pick(self.names), "code:identifier")

    def define(self) -> str:
        """Writes a name that is new here half of the time; the caller makes it usable once its value is written."""
        name = self.writer.pick(NOUNS) if self.writer.chance(0.5) else self.writer.pick(self.names)
        self.writer.add(name, "code:identifier")
        return name

    def string(self) -> None:
        self.writer.add(f'"{self.writer.pick(STRINGS)}"', "code:string")

    def number(self) -> None:
        self.writer.add(str(self.writer.pick((0, 1, 2, 10, 100, 3, 5, 8, 64, 1000))), "code:number")

    def value(self) -> None:
        draw = self.writer.random()
        if draw < 0.6:
            self.name()
        elif draw < 0.85:
            self.number()
        else:
            self.string()

    def expression(self, depth: int = 0) -> None:
        writer, draw = self.writer, self.writer.random()
        if draw < 0.3 or depth > 1:
            self.value()
        elif draw < 0.55:
            self.name()
            self.operator(writer.pick(OPERATORS))
            self.expression(depth + 1)
        elif draw < 0.75:
            writer.add(writer.pick(BUILTINS), "code:call")
            writer.add("(")
            self.expression(depth + 1)
            writer.add(")")
        elif draw < 0.87:
            self.name()
            writer.add("[")
            self.value()
            writer.add("]")
        else:
            self.name()
            writer.add(".")
            writer.add(writer.pick(METHODS), "code:call")
            writer.add("(")
            self.value()
            writer.add(")")

    def condition(self) -> None:
        if self.writer.chance(0.2):
            self.keyword("not")
            self.writer.add(" ")
        self.name()
        if self.writer.chance(0.7):
            self.operator(self.writer.pick(COMPARISONS))
            self.value()

    def comment(self) -> None:
        self.writer.add("# " + self.writer.pick(COMMENTS), "code:comment")

    def body(self, count: int) -> None:
        inner = _Block(self.writer, list(self.names), self.indent + 1)
        for _ in range(count):
            inner.statement()

    def statement(self) -> None:
        self.start()
        draw = self.writer.random()
        if draw > 0.8 and self.indent < 3:
            self.writer.pick((self.conditional, self.loop, self.loop, self.attempt))()
        elif draw > 0.7:
            self.comment()
            self.writer.add("\n")
            self.start()
            self.assignment()  # a block of comments only would not be Python
        elif draw > 0.55:
            self.call()
        else:
            self.assignment()

    def assignment(self) -> None:
        name = self.define()
        self.operator("=" if name not in self.names or self.writer.chance(0.7) else "+=")
        self.expression()
        self.names.append(name)
        if self.writer.chance(0.1):
            self.writer.add("  ")
            self.comment()
        self.writer.add("\n")

    def call(self) -> None:
        if self.writer.chance(0.4):
            self.writer.add("print", "code:call")
            self.writer.add("(")
        else:
            self.name()
            self.writer.add(".")
            self.writer.add(self.writer.pick(METHODS), "code:call")
            self.writer.add("(")
        self.value()
        self.writer.add(")\n")

    def conditional(self) -> None:
        self.keyword("if")
        self.writer.add(" ")
        self.condition()
        self.writer.add(":\n")
        self.body(self.writer.integer(1, 2))
        if self.writer.chance(0.4):
            self.start()
            self.keyword("else")
            self.writer.add(":\n")
            self.body(1)

    def loop(self) -> None:
        writer = self.writer
        if writer.chance(0.25):
            self.keyword("while")
            writer.add(" ")
            self.condition()
            writer.add(":\n")
            self.body(2)
            return
        self.keyword("for")
        writer.add(" ")
        variable = writer.pick(("i", "j", "x", "item", "key", "row"))
        writer.add(variable, "code:identifier")
        writer.add(" ")
        self.keyword("in")
        writer.add(" ")
        if writer.chance(0.5):
            writer.add("range", "code:call")
            writer.add("(")
            self.value()
            writer.add(")")
        else:
            self.name()
        writer.add(":\n")
        inner = _Block(writer, [*self.names, variable, variable], self.indent)
        inner.body(writer.integer(1, 3))

    def attempt(self) -> None:
        self.keyword("try")
        self.writer.add(":\n")
        self.body(1)
        self.start()
        self.keyword("except")
        self.writer.add(" ")
        self.writer.add(self.writer.pick(EXCEPTIONS), "code:type")
        self.writer.add(":\n")
        inner = _Block(self.writer, self.names, self.indent + 1)
        inner.start()
        self.keyword(self.writer.pick(("raise", "pass", "return")))
        self.writer.add("\n")


def code(writer: Writer) -> None:
    """A module: imports, then one to three functions."""
    module = _Block(writer, [], 0)
    for name in writer.sample(MODULES, writer.integer(0, 3)):
        module.keyword("import")
        writer.add(" ")
        writer.add(name, "code:identifier")
        writer.add("\n")
    for _ in range(writer.integer(1, 3)):
        if writer.length:
            writer.add("\n\n")
        _function(writer)


def _function(writer: Writer) -> None:
    outer = _Block(writer, [], 0)
    parameters = writer.sample(NOUNS, writer.integer(1, 3))
    outer.keyword("def")
    writer.add(" ")
    noun = writer.pick(NOUNS)
    writer.add(f"{writer.pick(VERBS)}_{noun}", "code:identifier", "code:definition")
    writer.add("(")
    for position, parameter in enumerate(parameters):
        if position:
            writer.add(", ")
        writer.add(parameter, "code:identifier")
        if writer.chance(0.3):
            writer.add(": ")
            writer.add(writer.pick(TYPES), "code:type")
    writer.add("):\n")
    block = _Block(writer, parameters, 1)
    if writer.chance(0.5):
        block.start()
        summary = writer.pick(SUMMARIES).format(noun, parameters[0])
        writer.add(f'"""{summary}"""', "code:docstring")
        writer.add("\n")
    for _ in range(writer.integer(3, 7)):
        block.statement()
    block.start()
    block.keyword("return")
    writer.add(" ")
    block.expression()
    writer.add("\n")
