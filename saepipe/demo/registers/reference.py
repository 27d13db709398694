"""Encyclopedic entries, weather reports and match reports: facts that agree within the document."""

from __future__ import annotations

from saepipe.demo.grammar import Grammar, Writer
from saepipe.demo.lexicon import CAPITAL, LEXICON

ENTRY = Grammar(
    {
        "field|role:noun": """
            astronomy, botany, chemistry, geometry, history, law, medicine, music, painting, philosophy, physics,
            poetry, sculpture, surgery, theology, algebra, architecture, geology, linguistics, navigation""",
        "famous_for|role:verb": "discovered, invented, described, founded, translated, published, designed, composed",
        "work|role:noun": """
            theory, symphony, bridge, comet, vaccine, dictionary, treaty, opera, telescope, novel, cathedral, method,
            alphabet, engine, map, atlas, medal, expedition, library, observatory""",
        "industry|role:noun": """
            fishing, wine, tourism, shipbuilding, coal, textiles, agriculture, salt, trade, glass, silk, timber,
            copper, paper, printing""",
        "landmark|role:noun": """
            cathedral, castle, harbour, university, old market, town hall, opera house, bridge, fort""",
        "habitat|role:noun": """
            forests, rivers, deserts, mountains, meadows, swamps, caves, coasts, grasslands, lakes, islands, gardens""",
        "diet|entity:food": "insects, leaves, seeds, small fish, roots, berries, worms, grass, fruit, eggs, nectar",
        "class": "mammals, birds, reptiles, insects, amphibians",
        "size": ["{tens} {length_unit}", "{digit}.{digit} {long_unit}"],
        "length_unit|entity:unit": "cm, centimetres",
        "long_unit|entity:unit": "metres, m",
        "distance|entity:unit": "km, kilometres, miles",
        "person_fact": [
            "{^pronoun@he|role:subject} {famous_for} the {quality} {work|role:object} of {city}.",
            "{^pronoun@he|role:subject} studied {field@field} at the University of {city@school}.",
            "In {year}, {pronoun@he|role:subject} married {person@spouse}, {a+profession}.",
            "{^pronoun@he|role:subject} taught {field@field} in {city@school} for {tens} years.",
            "A {work} in {city@home} is named after {surname@last}.",
            "{surname@last|role:subject} {famous_for} the {work@work|role:object} in {year}.",
            "The {work@work|role:subject} was admired by {person@spouse} and {person}.",
            "{^pronoun@he|role:subject} worked for the {organisation@employer} until {year}.",
        ],
        "place_fact": [
            "The town lies on {river@river}, {tens} {distance} from {city}.",
            "Its {landmark|role:subject} was built in {year} by {person@builder}.",
            "The main industries are {industry} and {industry}.",
            "In {year} the town had {thousands} inhabitants.",
            "{person@native|role:subject}, the {profession}, was born here in {year}.",
            "The {organisation|role:subject} has its seat in {place_name@place}.",
            "{^river@river} flooded the {landmark|role:object} in {year}.",
            "Every {season} a festival of {food} is held at the {landmark}.",
            "The {landmark} of {place_name@place} was the {ordinal} of its kind in {country@country}.",
        ],
        "animal_fact": [
            "The {species@species|role:subject} feeds on {diet} and {diet}.",
            "It lives in the {habitat} of {country} and {country}.",
            "An adult reaches a length of {size}.",
            "The female lays {count} eggs in {month@season}.",
            "It was first described by {surname} in {year}.",
            "Its {colour} tail is longer than that of the {animal}.",
            "The {species@species|role:subject} is hunted by the {animal}.",
            "It sleeps in {habitat} during the {season}.",
            "The young stay with the mother for {tens} days.",
        ],
        "organisation_fact": [
            "The {organisation@company|role:subject} was founded in {year@founded} by {person@founder}.",
            "It employs {thousands} people in {city@seat} and {city}.",
            "In {year}, it bought the {organisation@rival|role:object} for {money}.",
            "Its main products are {industry} and {industry}.",
            "{person@founder|role:subject}, {a+profession}, led it for {tens} years.",
            "The head office in {city@seat} was designed by {person}.",
            "Its rival, the {organisation@rival}, is based in {city}.",
        ],
        "pronoun|role:pronoun": "it",
        "place_name|entity:place": "Town",
        "species|entity:animal": "Animal",
    },
    parent=LEXICON,
)

PLACE_HEADS = "Ash Oak Elm Stone Wood King North South East West Clear Black White Red Mill Brook Hart Fox".split()
PLACE_TAILS = "ford ton ham bridge field wick dale mouth bury stead port haven".split()


def encyclopedia(writer: Writer) -> None:
    """An entry on a person, a town, an animal or an organisation."""
    kind = writer.pick((_person_entry, _place_entry, _animal_entry, _organisation_entry))
    symbol = kind(writer)
    for _ in range(writer.integer(1, 3)):
        ENTRY.repeat(writer, symbol, 3, 5)
        writer.add("\n")


def _person_entry(writer: Writer) -> str:
    gender, pronoun = writer.pick((("woman", "she"), ("man", "he")))
    first, last = writer.pick(ENTRY.words(gender)), writer.pick(ENTRY.words("surname"))
    writer.remember("he", pronoun, "role:pronoun")
    writer.remember("last", last, "entity:person")
    born = writer.integer(1700, 1960)
    writer.add(f"{first} {last}", "entity:person", "encyclopedia:headword")
    writer.add(" (")
    writer.add(f"{born}-{born + writer.integer(30, 95)}", "entity:date")
    writer.add(") was a")
    country = writer.pick(ENTRY.words("country"))
    profession = writer.pick(ENTRY.words("profession"))
    writer.add("n " if profession[0] in "aeiou" else " ")
    writer.add(profession, "entity:profession")
    writer.add(" from ")
    writer.add(country, "entity:place")
    writer.add(", born in ")
    ENTRY.write(writer, "city")
    writer.add(".\n")
    return "person_fact"


def _place_entry(writer: Writer) -> str:
    name = writer.pick(PLACE_HEADS) + writer.pick(PLACE_TAILS)
    country = writer.pick(tuple(CAPITAL))
    writer.remember("place", name, "entity:place")
    writer.remember("country", country, "entity:place")
    writer.add(name, "entity:place", "encyclopedia:headword")
    writer.add(" is a town in ")
    writer.add(country, "entity:place")
    writer.add(", ")
    writer.add(str(writer.integer(10, 300)), "entity:number")
    writer.add(" ")
    writer.add("km", "entity:unit")
    writer.add(f" {writer.pick(('north', 'south', 'east', 'west'))} of the capital, ")
    writer.add(CAPITAL[country], "entity:place", "encyclopedia:capital")
    writer.add(".\n")
    return "place_fact"


def _animal_entry(writer: Writer) -> str:
    colour, animal = writer.pick(ENTRY.words("colour")), writer.pick(ENTRY.words("animal"))
    name = f"{colour} {animal}"
    writer.remember("species", name, "entity:animal")
    writer.add(f"The {name}", "entity:animal", "encyclopedia:headword")
    writer.add(" (")
    writer.add(f"{writer.pick(LATIN_HEADS)} {writer.pick(LATIN_TAILS)}", "encyclopedia:latin")
    writer.add(f") is a species of {animal} found in ")
    ENTRY.write(writer, "country")
    writer.add(".\n")
    return "animal_fact"


LATIN_HEADS = "Canis Felis Ursus Corvus Rana Salmo Apis Aquila Vulpes Lepus Cervus Strix Testudo Lacerta".split()
LATIN_TAILS = "major minor vulgaris niger albus ruber montanus communis borealis rusticus domesticus agilis".split()


def _organisation_entry(writer: Writer) -> str:
    start = writer.length
    writer.add("The ")
    company = writer.length
    ENTRY.write(writer, "organisation")
    writer.remember("company", writer.text()[company:], "entity:organisation")
    writer.label_from(start, "encyclopedia:headword")
    writer.add(" is based in ")
    seat = writer.pick(ENTRY.words("city"))
    writer.remember("seat", seat, "entity:place")
    writer.add(seat, "entity:place")
    writer.add(".\n")
    return "organisation_fact"


WEATHER = Grammar(
    {
        "degrees|entity:temperature": ["{digit} °C", "1{any_digit} °C", "2{any_digit} °C", "-{digit} °C"],
        "speed": ["{tens} {speed_unit}"],
        "speed_unit|entity:unit": "km/h",
        "percent|entity:number": ["{tens}%"],
        "sky|weather:condition": """
            cloudy, sunny, rainy, foggy, windy, stormy, clear, overcast, snowy, humid, mild, dry, freezing, misty""",
        "phenomenon|weather:condition": """
            rain, snow, thunderstorms, fog, showers, strong winds, sunshine, hail, drizzle, frost, clouds,
            a heat wave""",
        "direction": "north, south, east, west, northwest, southeast, southwest, northeast",
        "part": "In the morning, In the afternoon, Overnight, Towards evening, Around noon, Before sunrise",
        "region": "in the north, in the south, along the coast, in the hills, inland, near the lakes, in the valleys",
        "sentence": [
            "{part}, {phenomenon} {region}.",
            "{part} it will be {sky} {region}, with {phenomenon} in places.",
            "Winds from the {direction@wind} at {speed}.",
            "Temperatures will reach {degrees} {region} and {degrees} in {city}.",
            "The chance of {phenomenon} is {percent}.",
            "{^phenomenon} may cause delays on roads {region}.",
            "On {weekday} it turns {sky} again, with {phenomenon}.",
            "Humidity {percent}, pressure 10{any_digit}{any_digit} hPa.",
            "A warning of {phenomenon} is in force for {city@town} until {time}.",
        ],
    },
    parent=LEXICON,
)


def weather(writer: Writer) -> None:
    """A forecast for one city; the high is above the low."""
    city = writer.remember("town", writer.pick(WEATHER.words("city")), "entity:place")
    writer.add("Weather for ")
    writer.add(city, "entity:place")
    writer.add(", ")
    WEATHER.line(writer, "date")
    low = writer.integer(-8, 22)
    writer.add("Low ")
    writer.add(f"{low} °C", "entity:temperature")
    writer.add(", high ")
    writer.add(f"{low + writer.integer(3, 14)} °C", "entity:temperature")
    writer.add(". Mostly ")
    WEATHER.write(writer, "sky")
    writer.add(".\n")
    for _ in range(writer.integer(1, 2)):
        WEATHER.repeat(writer, "sentence", 3, 5)
        writer.add("\n")


SPORT = Grammar(
    {
        "nickname": "United, City, Rovers, Athletic, Wanderers, Tigers, Eagles, Stars, Town, Rangers",
        "scored|role:verb": "scored, equalised, struck, headed in, converted a penalty, netted, shot home",
        "how": "from close range, after a corner, with a header, from 20 metres, on the rebound, from a free kick",
        "colour_line": [
            "{keeper@keeper|role:subject} saved a shot by {surname}.",
            "The referee, {person@referee|role:subject}, showed {surname} a {colour} card.",
            "{thousands} spectators watched at the {city@ground} stadium.",
            "Coach {surname@coach|role:subject} was {mood} after the match.",
            '"{quote|quote:inside}" said coach {surname@coach}.',
            "{surname|role:subject} hit the post {how}.",
        ],
        "quote": ["We played {manner}.", "The boys were {quality} today.", "On {weekday} we must play {manner}."],
        "mood|role:adjective": "pleased, angry, disappointed, delighted, satisfied, silent, proud",
        "keeper|entity:person": ["{surname}"],
    },
    parent=LEXICON,
)


def sport(writer: Writer) -> None:
    """A match report; the running score counts the goals, and the verdict follows from the result."""
    towns = writer.sample(SPORT.words("city"), 2)
    teams = [f"{town} {writer.pick(SPORT.words('nickname'))}" for town in towns]
    goals = [writer.pick((0, 1)) for _ in range(writer.integer(0, 6))]
    score = [goals.count(0), goals.count(1)]
    writer.add(teams[0], "entity:team")
    writer.add(" ")
    writer.add(f"{score[0]}-{score[1]}", "sport:score")
    writer.add(" ")
    writer.add(teams[1], "entity:team")
    writer.add("\n\n")
    _verdict(writer, teams, score)
    minute, running = 0, [0, 0]
    for side in goals:
        minute += writer.integer(1, 14)
        running[side] += 1
        writer.add("In minute ")
        writer.add(str(minute), "sport:minute")
        writer.add(", ")
        SPORT.write(writer, "surname", "role:subject")
        writer.add(" ")
        SPORT.write(writer, "scored")
        writer.add(" for ")
        writer.add(teams[side], "entity:team")
        writer.add(" ")
        SPORT.write(writer, "how")
        writer.add(" (")
        writer.add(f"{running[0]}-{running[1]}", "sport:score")
        writer.add("). ")
        if writer.chance(0.3):
            SPORT.write(writer, "colour_line")
            writer.add(" ")
    SPORT.repeat(writer, "colour_line", 2, 4)
    writer.add("\n")


def _verdict(writer: Writer, teams: list[str], score: list[int]) -> None:
    if score[0] == score[1]:
        writer.add(f"{teams[0]} and {teams[1]}", "entity:team")
        writer.add(" shared the points on ")
    else:
        winner = 0 if score[0] > score[1] else 1
        writer.add(teams[winner], "entity:team")
        writer.add(" beat " if abs(score[0] - score[1]) < 3 else " crushed ")
        writer.add(teams[1 - winner], "entity:team")
        writer.add(" on ")
    SPORT.write(writer, "weekday")
    writer.add(".\n")
