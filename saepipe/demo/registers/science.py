"""DNA in FASTA records and worked arithmetic: text whose continuation follows from rules."""

from __future__ import annotations

from saepipe.demo.grammar import Writer
from saepipe.demo.lexicon import LEXICON

# One codon per amino acid: a gene is then readable, and a model can learn the code.
CODONS = {
    "A": "GCC", "R": "CGT", "N": "AAC", "D": "GAT", "C": "TGC", "Q": "CAG", "E": "GAA", "G": "GGC", "H": "CAT",
    "I": "ATT", "L": "CTG", "K": "AAA", "F": "TTC", "P": "CCG", "S": "AGC", "T": "ACC", "W": "TGG", "Y": "TAT",
    "V": "GTG",
}  # fmt: skip
MOTIFS = ("AKLVE", "GDSGGP", "HRDLK", "WSPGA", "LLIVG", "CPHC", "NKTGE", "RRFDA", "PEEQY", "GKST", "VTYNA", "DFGLA")
REPEATS = ("CAG", "GATA", "TTAGGG", "AC", "CGG", "TATATA", "GAA")
SPECIES = ("Homo sapiens", "Mus musculus", "Danio rerio", "Gallus gallus", "Bos taurus", "Apis mellifera")
GENES = "INS HBB TP53 BRCA1 CFTR MYC KRAS SOX2 PAX6 FOXP2 ACTB TTN RHO DMD LCT GAPDH VEGFA APOE".split()
LINE_WIDTH = 60


def dna(writer: Writer) -> None:
    """FASTA records: a promoter, a gene from start to stop codon made of known motifs, then repeats."""
    species = writer.pick(SPECIES)
    for record in range(writer.integer(2, 4)):
        if record:
            writer.add("\n")
        protein = "M" + "".join(writer.pick(MOTIFS) for _ in range(writer.integer(3, 9)))
        writer.add(f">seq{record + 1} {species} {writer.pick(GENES)} gene, {len(protein)} aa", "dna:header")
        writer.add("\n")
        repeat = writer.pick(REPEATS)
        pieces = (
            ("GGCTATAAAAGC", "dna:promoter"),
            ("".join("ATG" if acid == "M" else CODONS[acid] for acid in protein) + "TAA", "dna:gene"),
            (repeat * writer.integer(3, 12), "dna:repeat"),
        )
        column = 0
        for sequence, label in pieces:
            column = _wrapped(writer, sequence, label, column)
        writer.add("\n")
        if writer.chance(0.5):
            writer.add(f">seq{record + 1} translation", "dna:header")
            writer.add("\n")
            _wrapped(writer, protein, "dna:protein", 0)
            writer.add("\n")


def _wrapped(writer: Writer, sequence: str, label: str, column: int) -> int:
    """Writes a sequence in lines of LINE_WIDTH, the first from `column`; returns the column where it ends."""
    while sequence:
        if column == LINE_WIDTH:
            writer.add("\n")
            column = 0
        chunk, sequence = sequence[: LINE_WIDTH - column], sequence[LINE_WIDTH - column :]
        writer.add(chunk, label)
        column += len(chunk)
    return column


def arithmetic(writer: Writer) -> None:
    """Sums, products, word problems and step-by-step evaluations, all of them right."""
    writer.add(writer.pick(("Exercises", "Arithmetic", "Problem set", "Solutions", "Worksheet")))
    writer.add(f" {writer.integer(1, 40)}\n")
    tasks = writer.sample(TASKS, 2)
    for number in range(1, writer.integer(8, 16) + 1):
        writer.add(f"{number}) ")
        writer.pick(tasks)(writer)
        writer.add("\n")


def _operator(writer: Writer, symbol: str) -> None:
    writer.add(" ")
    writer.add(symbol, "arithmetic:operator")
    writer.add(" ")


def _equals(writer: Writer, value: int) -> None:
    _operator(writer, "=")
    writer.add(str(value), "arithmetic:result")


def _operation(writer: Writer) -> None:
    symbol = writer.pick("+-*/")
    left, right = writer.integer(2, 99), writer.integer(2, 99)
    if symbol in "*/":
        left, right = writer.integer(2, 12), writer.integer(2, 12)
    if symbol == "/":
        left *= right
    if symbol == "-" and right > left:
        left, right = right, left
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[symbol]
    writer.add(str(left), "arithmetic:operand")
    _operator(writer, symbol)
    writer.add(str(right), "arithmetic:operand")
    _equals(writer, result)


def _steps(writer: Writer) -> None:
    """(a + b) * c, evaluated from the inside."""
    first, second, factor = writer.integer(1, 12), writer.integer(1, 12), writer.integer(2, 9)
    symbol = "+" if second > first or writer.chance(0.5) else "-"
    inner = first + second if symbol == "+" else first - second
    writer.add("(")
    writer.add(str(first), "arithmetic:operand")
    _operator(writer, symbol)
    writer.add(str(second), "arithmetic:operand")
    writer.add(")")
    _operator(writer, "*")
    writer.add(str(factor), "arithmetic:operand")
    _operator(writer, "=")
    writer.add(str(inner), "arithmetic:step")
    _operator(writer, "*")
    writer.add(str(factor), "arithmetic:operand")
    _equals(writer, inner * factor)


def _compare(writer: Writer) -> None:
    left, right = writer.integer(1, 99), writer.integer(1, 99)
    writer.add(str(left), "arithmetic:operand")
    writer.add(" is ")
    word = "greater than" if left > right else "less than" if left < right else "equal to"
    writer.add(word, "arithmetic:comparison")
    writer.add(" ")
    writer.add(str(right), "arithmetic:operand")


def _sequence(writer: Writer) -> None:
    start, step, count = writer.integer(1, 20), writer.integer(1, 10), writer.integer(4, 7)
    writer.add("Continue: ")
    terms = [str(start + step * position) for position in range(count)]
    writer.add(", ".join(terms), "arithmetic:operand")
    writer.add(", ")
    writer.add(str(start + step * count), "arithmetic:result")


def _word_problem(writer: Writer) -> None:
    person = writer.pick(LEXICON.words(writer.pick(("woman", "man"))))
    thing = writer.pick(("apples", "coins", "books", "stamps", "eggs", "pencils", "marbles", "tickets"))
    had, change = writer.integer(5, 40), writer.integer(1, 20)
    gains = change > had or writer.chance(0.5)
    writer.add(person, "entity:person")
    writer.add(" has ")
    writer.add(str(had), "arithmetic:operand")
    writer.add(f" {thing} and {'gets' if gains else 'loses'} ")
    writer.add(str(change), "arithmetic:operand")
    writer.add(". Now there are ")
    writer.add(str(had + change if gains else had - change), "arithmetic:result")
    writer.add(f" {thing}.")


def _remainder(writer: Writer) -> None:
    number, divisor = writer.integer(10, 99), writer.integer(2, 9)
    writer.add(str(number), "arithmetic:operand")
    _operator(writer, "/")
    writer.add(str(divisor), "arithmetic:operand")
    _equals(writer, number // divisor)
    writer.add(" remainder ")
    writer.add(str(number % divisor), "arithmetic:result")


TASKS = (_operation, _operation, _steps, _compare, _sequence, _word_problem, _remainder)
