"""Legal clauses and letters: the defined terms, names and dates of a document stay the same throughout."""

from __future__ import annotations

from saepipe.demo.grammar import Grammar, Writer
from saepipe.demo.lexicon import LEXICON

# Pairs of parties whose names stay together in a contract.
PARTIES = (
    ("Lessor", "Lessee"),
    ("Seller", "Buyer"),
    ("Licensor", "Licensee"),
    ("Employer", "Employee"),
    ("Client", "Contractor"),
    ("Borrower", "Lender"),
    ("Supplier", "Purchaser"),
    ("Insurer", "Policyholder"),
    ("Landlord", "Tenant"),
    ("Franchisor", "Franchisee"),
)

LEGAL = Grammar(
    {
        "party_a|legal:party": "Seller",  # bound by the writer
        "party_b|legal:party": "Buyer",
        "subject_matter|role:noun": """
            Premises, Goods, Services, Software, Property, Equipment, Patent, Shares, Vehicle, Loan, Deposit, Works,
            Trademark, Data, Invention, Manuscript, Vessel, Policy""",
        "heading|legal:heading": """
            Definitions, Term, Payment, Termination, Confidentiality, Liability, Warranty, Governing Law, Assignment,
            Notices, Force Majeure, Indemnity, Inspection, Delivery, Insurance, Severability, Amendments, Disputes,
            Entire Agreement, Renewal""",
        "modal|legal:obligation": "shall, must, shall not, may not, agrees to, undertakes to, is obliged to, may",
        "duty": [
            "{duty_verb} the {subject_matter@matter|role:object}",
            "{duty_verb} the {subject_matter@matter|role:object} {condition}",
            "pay {money|role:object} to the other party {condition}",
            "give written notice {condition}",
            "{duty_verb} all {document|role:object} and {duty_verb} any {document|role:object}",
            "indemnify the {party_b@b|role:object} against any {claim} arising out of this Agreement",
        ],
        "duty_verb|role:verb": """
            maintain, deliver, transfer, inspect, insure, return, assign, use, disclose, deposit, repair, retain,
            register, sublet, modify, pledge, examine, protect, replace, store""",
        "document|role:noun": """
            records, invoices, keys, copies, certificates, licences, accounts, drawings, permits, documents, receipts,
            reports, samples, plans""",
        "claim|role:noun": "claim, loss, damage, liability, penalty, cost, tax, fine, proceeding, expense",
        "condition": [
            "within {tens} days of {event}",
            "no later than {date}",
            "upon {event}",
            "unless otherwise agreed in writing",
            "without the prior written consent of the {party_a@a|legal:party}",
            "in accordance with Section {digit}.{digit}",
            "subject to clause {digit}",
            "for a period of {count} months",
            "at the sole expense of the {party_b@b|legal:party}",
        ],
        "event": [
            "the {milestone}",
            "receipt of notice",
            "the {milestone} of this Agreement",
            "the death of the {party_b@b}",
            "{milestone} of the {subject_matter@matter}",
        ],
        "milestone|role:noun": "termination, execution, expiry, delivery, renewal, breach, completion, transfer, sale",
        "party": ["the {party_a@a|role:subject}", "the {party_b@b|role:subject}"],
        "clause": [
            "{^party} {modal} {duty}.",
            "{^party} {modal} {duty}, provided that {party} {modal} {duty}.",
            "If {party} fails to {duty}, {party} {modal} {duty}.",
            "In the event of {claim}, {party} {modal} {duty}.",
            "Neither party {modal} {duty}.",
            "Notwithstanding Section {digit}.{digit}, {party} {modal} {duty}.",
            "{^party} hereby represents and warrants that the {subject_matter@matter} is free of any {claim}.",
            "This Agreement is governed by the laws of {country@law}.",
            "Any dispute shall be settled by the courts of {city@court}.",
            "For the purposes of this Agreement, the {subject_matter@matter} includes all {document} and {document}.",
        ],
        "opening": [
            "This {agreement@kind} Agreement is made on {full_date@signed} between {organisation@one} (the "
            '"{party_a@a|quote:inside}") and {person@two} (the "{party_b@b|quote:inside}").',
            "This Agreement, dated {full_date@signed}, sets out the terms between {organisation@one} (the "
            '"{party_a@a|quote:inside}") and {organisation@two} (the "{party_b@b|quote:inside}").',
        ],
        "agreement": "Lease, Purchase, Licence, Employment, Service, Loan, Supply, Insurance",
        "witness": [
            "IN WITNESS WHEREOF the parties have executed this Agreement on {full_date@signed}.",
            "Signed by {organisation@one} in {city@court}, {full_date@signed}.",
            "WHEREAS the {party_a@a} owns the {subject_matter@matter}, the parties agree as above.",
        ],
    },
    parent=LEXICON,
)


def legal(writer: Writer) -> None:
    """A contract with numbered sections between two parties."""
    first, second = writer.pick(PARTIES)
    writer.remember("a", first, "legal:party")
    writer.remember("b", second, "legal:party")
    LEGAL.line(writer, "opening")
    for section in range(1, writer.integer(2, 4) + 1):
        writer.add("\n")
        writer.add(f"{section}", "legal:section")
        writer.add(". ")
        LEGAL.line(writer, "heading")
        for clause in range(1, writer.integer(1, 3) + 1):
            writer.add(f"{section}.{clause}", "legal:section")
            writer.add(" ")
            LEGAL.line(writer, "clause")
    writer.add("\n")
    LEGAL.line(writer, "witness")


LETTER = Grammar(
    {
        "greeting": [
            "Dear {woman@to|letter:recipient},",
            "Dear {man@to|letter:recipient},",
            "Dear Mr. {surname@to|letter:recipient},",
            "Dear Mrs. {surname@to|letter:recipient},",
            "Hello {woman@to|letter:recipient},",
            "Hi {man@to|letter:recipient},",
        ],
        "closing": "Yours sincerely, Best wishes, Kind regards, With love, Yours truly, Warm regards, Many thanks",
        "matter|role:noun": """
            invoice, parcel, contract, appointment, garden, concert, manuscript, apartment, wedding, journey, meeting,
            order, report, visit, lesson, exhibition, application, repair, loan, photographs, harvest, book,
            interview""",
        "fine|role:adjective": "well, busy, glad, sorry, happy, grateful, worried, surprised, pleased, sick, late",
        "verb|role:verb": """
            send, discuss, cancel, confirm, finish, arrange, postpone, receive, review, sign, return, plan, explain,
            forget, prepare, check, visit""",
        "relative|role:noun": """
            sister, brother, mother, father, cousin, neighbour, uncle, aunt, daughter, son, colleague""",
        "modal|role:auxiliary": "can, could, will, should, might, cannot",
        "opening": [
            "Thank you for your letter of {date} about the {matter@matter|role:object}.",
            "I am writing about the {matter@matter|role:object} in {city@town}.",
            "I hope you are {fine} and that the {matter@matter|role:subject} went as planned.",
            "It was good to hear from you and your {relative} in {city@town}.",
            "With reference to order no. {hundreds@order}, I have not yet received the {matter@matter|role:object}.",
        ],
        "sentence": [
            "We {modal} {verb} the {matter@matter|role:object} on {weekday@day} at {time@hour}.",
            "Please {verb} the {matter@matter|role:object} before {date}.",
            "My {relative@family|role:subject} is {fine} and sends you {food}.",
            "I {modal} {verb} it, but {person@third|role:subject} {modal} not {verb} it.",
            "Would you {verb} the {matter|role:object} with {person@third}?",
            "The {matter@matter|role:subject} costs {money@price}, which is more than we agreed.",
            "If you {modal} {verb} the {matter|role:object}, please tell my {relative@family}.",
            "We are staying in {city@town} until {month}.",
            "{person@third|role:subject} from the {organisation} asked me to {verb} the {matter@matter|role:object}.",
            "The weather in {city@town} is {quality}, and the {animal} is {fine}.",
            "I enclose {money@price} for the {matter@matter}.",
            "Do you remember the {quality} {matter} in {country}?",
        ],
        "last": [
            "I look forward to your answer.",
            "Please write soon.",
            "See you on {weekday@day} at {time@hour}.",
            "Give my love to your {relative}.",
            "I remain at your service.",
        ],
        "subject_line": [
            "The {matter@matter} on {weekday@day}",
            "Re: {matter@matter} in {city@town}",
            "Your {matter@matter}",
            "{^matter@matter} ({money@price})",
        ],
        "provider": "example.com, mail.example, post.example, office.example, home.example",
    },
    parent=LEXICON,
)


def letter(writer: Writer) -> None:
    """A letter or an e-mail; the signature of an e-mail repeats its sender."""
    first = writer.pick(LETTER.words(writer.pick(("woman", "man"))))
    last = writer.pick(LETTER.words("surname"))
    sender = f"{first} {last}"
    if writer.chance(0.5):
        writer.add("From: ")
        writer.add(sender, "entity:person", "letter:sender")
        writer.add(" <")
        writer.add(f"{first.lower()}.{last.lower()}@{writer.pick(LETTER.words('provider'))}", "entity:email")
        writer.add(">\nSubject: ")
        start = writer.length
        LETTER.line(writer, "subject_line")
        writer.label_from(start, "letter:subject")
        writer.add("\n")
    else:
        writer.remember("town", writer.pick(LETTER.words("city")), "entity:place")
        writer.emit(writer.memory["town"])
        writer.add(", ")
        LETTER.line(writer, "full_date")
        writer.add("\n")
    LETTER.line(writer, "greeting")
    writer.add("\n")
    LETTER.write(writer, "opening")
    writer.add(" ")
    for _ in range(writer.integer(1, 2)):
        LETTER.repeat(writer, "sentence", 2, 4)
        writer.add("\n")
    LETTER.line(writer, "last")
    writer.add("\n")
    LETTER.write(writer, "closing", "letter:closing")
    writer.add(",\n")
    writer.add(sender, "entity:person", "letter:sender")
    writer.add("\n")
